"""What the server does when it starts and stops: SIGTERM delivers what is pending before the process ends.

A server's own routes may go here too. They are not authenticated unless langgraph.json says so.
"""

from metering import meter
from starlette.applications import Starlette

app = Starlette(lifespan=meter.lifespan)
