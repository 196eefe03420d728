"""Chat with a final model in this process, and print how to serve it and how to ask the server.

python examples/serve_and_chat.py runs/demo/model 我的订单还没到！
"""

import argparse
import json
import urllib.request

from csc_train.chat.config import ChatConfig
from csc_train.chat.conversation import Conversation
from csc_train.inference.hf import load_final_model
from csc_train.template.reply import Reply, format_reply
from csc_train.template.system_prompt import system_prompt


def chat(model: str, messages: list[str], max_new_tokens: int = 64) -> list[str]:
    """The supporter's replies as `[strategy]reply`: the opening one, then one for each message of the customer."""
    conversation = Conversation(load_final_model(model), ChatConfig(model, max_new_tokens=max_new_tokens))
    replies = []
    for message in [None, *messages]:
        *_, reply = conversation.reply(message)  # the reply as it grows; the last one is complete
        replies.append(format_reply(Reply(reply.strategy, reply.response), "zh"))
    return replies


def request_body(model: str, replies: list[str], messages: list[str]) -> dict:
    """A chat-completion request for the reply to the last message.

    Greedy decoding, as recipes/evaluate.py does: the penalty of 0 replaces the one of the base model's settings.
    """
    turns = [{"role": "system", "content": system_prompt("joint", "zh")}]
    for reply, message in zip(replies, messages, strict=False):
        turns += [{"role": "assistant", "content": reply}, {"role": "user", "content": message}]
    return {"model": model, "messages": turns, "temperature": 0, "frequency_penalty": 0}


def ask_server(url: str, body: dict) -> str:
    """The reply of an OpenAI-compatible server, such as `transformers serve`."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main() -> None:
    """Chat, then print the server's command and a request; with --url, send the request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of a final model")
    parser.add_argument("messages", nargs="+", help="messages of the customer")
    parser.add_argument("--url", help="a server to ask as well, such as http://127.0.0.1:8000")
    options = parser.parse_args()
    replies = chat(options.model, options.messages)
    body = request_body(options.model, replies, options.messages)
    print(*replies, sep="\n")
    print('\nServe it: pip install "transformers[serving]" && transformers serve --host 127.0.0.1 --port 8000')
    print(f"Ask it: POST http://127.0.0.1:8000/v1/chat/completions\n{json.dumps(body, ensure_ascii=False)}")
    if options.url:
        print(f"\nThe server's reply: {ask_server(options.url, body)}")


if __name__ == "__main__":
    main()
