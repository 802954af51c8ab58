"""A small OpenAI-compatible teacher for tests: ``python teacher_app.py PORT MODE LOG``.

It obeys the prompts well enough for its answers to pass the filters. Every request is appended to LOG as one JSON
line, so that tests can count what was asked. A file LOG with the suffix .limit holds how many it answers; further ones
wait until it holds more. Modes: good, garbage, broken (500), refusing (401), html, silent, dying.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

FILLERS = (
    "indeed",
    "surely",
    "moreover",
    "plainly",
    "often",
    "still",
    "gladly",
    "always",
    "nearly",
    "today",
    "perhaps",
)


def rewritten(text: str) -> str:
    """The text in short runs of its own words with others between: same facts, no 5-gram in common."""
    found = text.split()
    parts = []
    for number, start in enumerate(range(0, len(found), 3)):
        parts += [*found[start : start + 3], FILLERS[(number * number + number // 3) % len(FILLERS)]]
    return " ".join(parts) + "."


def answer(prompt: str) -> str:
    """What a good pupil says to each of our prompts."""
    if "Rewrite the following text" in prompt:
        return "Here is the rewritten text:\n\n" + rewritten(prompt.split("\n\n", 1)[1])
    if "Who is likely to read" in prompt:
        return "A patient librarian who collects old maps and stories about rivers."
    if "Answer with the sentence only" in prompt:
        persona = prompt.split("person: ", 1)[1].split("\n")[0]
        return f"This morning {persona} walks to the market and greets the neighbours."
    if "one question that this person" in prompt:
        persona = prompt.split("person: ", 1)[1].split("\n")[0]
        return f'The person would ask: "How does {persona} keep good records of the rivers nearby?"'
    if "Answer in three to five sentences" in prompt:
        return (
            "Good records begin with a steady habit and a dry notebook. Write down the date, the place and the height "
            "of the water. Compare the rivers each month, and keep a copy somewhere safe for whoever comes later."
        )
    return "Score: unclear."


def main() -> None:
    """Serve until killed."""
    port, mode, log_path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    limit = Path(log_path).with_suffix(".limit")
    asked = 0

    async def chat(request: Request) -> Response:
        nonlocal asked
        body = await request.json()
        asked += 1
        number = asked
        with open(log_path, "a") as log:  # noqa: PTH123
            log.write(json.dumps(body) + "\n")
        if mode == "broken":
            return JSONResponse({"error": {"message": "out of order"}}, status_code=500)
        if mode == "refusing":
            return JSONResponse({"error": {"message": "who are you"}}, status_code=401)
        if mode == "html":
            return HTMLResponse("<html>a login page</html>")
        while mode == "silent" or (limit.exists() and number > int(limit.read_text())):
            await asyncio.sleep(0.01)
        if mode == "dying" and asked > 5:
            os._exit(7)
        prompt = body["messages"][-1]["content"]
        text = "\u0436 %$ qq qq qq qq qq qq \ufffd" * 9 if mode == "garbage" else answer(prompt)
        message = {"role": "assistant", "content": text}
        return JSONResponse(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
            }
        )

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "pupil", "object": "model"}]})

    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main()
