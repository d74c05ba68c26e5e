"""A small graph, metered wherever and however it is run."""

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph
from metering import meter

USAGE = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}


def answer(state: MessagesState) -> dict[str, list[AIMessage]]:
    # In earnest: model = init_chat_model("openai:gpt-4o-mini"). This one needs no network; it would forget its usage
    # when streamed, so it does not stream.
    answers = iter([AIMessage("Hello!", usage_metadata=USAGE)])
    model = GenericFakeChatModel(messages=answers, disable_streaming=True)
    return {"messages": [model.invoke(state["messages"])]}


builder = StateGraph(MessagesState)
builder.add_node("answer", answer)
builder.add_edge(START, "answer")
graph = builder.compile().with_config(callbacks=[meter])
