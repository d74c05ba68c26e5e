"""Who is asking: what this returns is the server's word, and the only thing that decides who pays.

Look the token up where you keep your users; here it is the name of one of two.
"""

from langgraph_sdk import Auth

auth = Auth()
USERS = {"token-of-ann": "cus_ann", "token-of-bob": "cus_bob"}


@auth.authenticate
async def authenticate(authorization: str | None) -> Auth.types.MinimalUserDict:
    token = (authorization or "").removeprefix("Bearer ")
    if token not in USERS:
        raise Auth.exceptions.HTTPException(status_code=401, detail="unknown token")
    return {"identity": token, "stripe_customer_id": USERS[token]}  # type: ignore[typeddict-unknown-key]
