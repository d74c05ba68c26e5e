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


@auth.on
async def only_their_own(ctx: Auth.types.AuthContext, value: dict) -> dict[str, str]:
    """Users see and use only threads and assistants of their own; the server lets anybody use any otherwise."""
    owner = {"owner": ctx.user.identity}
    value.setdefault("metadata", {}).update(owner)
    return owner


@auth.on.crons
async def no_crons(ctx: Auth.types.AuthContext, value: dict) -> None:
    """The user of a cron's runs is an ``identity`` and nothing else: they would bill nobody."""
    raise Auth.exceptions.HTTPException(status_code=403, detail="crons are not allowed")
