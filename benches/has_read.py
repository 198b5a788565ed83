#!/usr/bin/env python3
"""Compares what the gateway says that an engine has read of a prompt with what the engine says that it found.

Needs nothing but Python, a gateway in front of one engine that tells `cached_tokens` in its usage
(`vllm serve ... --enable-prompt-tokens-details`), and its journal. Conversations that begin with one of three system
prompts go through the gateway; after every third turn somebody else asks the engine itself, and pushes out of its cache
what the gateway cannot have seen go. Run it with `kv_events` in the policy and without:

    benches/has_read.py --gateway http://127.0.0.1:8790 --admin http://127.0.0.1:8791 --engine http://127.0.0.1:8000 \
        --model tiny --block 128
"""

import argparse
import json
import random
import re
import time
import urllib.request

WORDS = "the quick brown fox jumps over the lazy dog and routes requests to models".split()


def arguments():
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--gateway", required=True, help="where clients ask")
    told.add_argument("--admin", required=True, help="its admin listener, for records")
    told.add_argument("--engine", required=True, help="the engine behind it, for the one who asks it directly")
    told.add_argument("--model", required=True)
    told.add_argument("--block", type=int, default=16, help="tokens of one of the engine's blocks")
    told.add_argument("--turns", type=int, default=120)
    told.add_argument("--seed", type=int, default=1)
    told.add_argument("--alone", action="store_true", help="nobody else asks the engine")
    return told.parse_args()


def prose(words, chance):
    return " ".join(chance.choice(WORDS) for _ in range(words))


def ask(url, model, messages, tokens):
    """Asks for a chat; returns the request's id, tokens of the prompt, and how many of them the engine had."""
    body = json.dumps({"model": model, "max_tokens": tokens, "temperature": 0, "messages": messages}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        usage = json.load(answer)["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return answer.headers["x-request-id"], usage["prompt_tokens"], details.get("cached_tokens") or 0


def has_read(admin, request):
    """Which share of the prompt the gateway took the engine to have read, from the request's record."""
    with urllib.request.urlopen(f"{admin}/admin/v1/requests/{request}", timeout=60) as answer:
        text = answer.read().decode()
    told = re.search(r"has read (\d+) of (\d+) tokens", text)
    return int(told[1]) / int(told[2]) if told else 0.0


def conversations(told, chance):
    """The turns of conversations, one after the other, each as it was answered."""
    systems = [prose(300, random.Random(which)) for which in range(3)]
    talks = []
    for turn in range(told.turns):
        if not talks or chance.random() < 0.4:
            talks.append([{"role": "system", "content": chance.choice(systems)}])
        talk = chance.choice(talks[-6:])
        talk.append({"role": "user", "content": prose(chance.randint(20, 200), chance)})
        if turn % 3 == 0 and not told.alone:
            ask(told.engine, told.model, [{"role": "user", "content": prose(1200, chance)}], 4)
        yield ask(told.gateway, told.model, talk, 8)
        talk.append({"role": "assistant", "content": "ok fine"})
        if len(json.dumps(talk)) > 9000:
            talks.remove(talk)


def main():
    told = arguments()
    answers = list(conversations(told, random.Random(told.seed)))
    time.sleep(1)  # The journal is written in groups.
    rows = [(tokens, has_read(told.admin, request) * tokens, found) for request, tokens, found in answers]
    prompts = sum(tokens for tokens, _, _ in rows)
    over = sum(max(0.0, said - found) for _, said, found in rows)
    under = sum(max(0.0, found - said) for _, said, found in rows)
    beyond = [sum(sign * (said - found) > told.block for _, said, found in rows) for sign in (1, -1)]
    print(f"{len(rows)} prompts, {prompts} tokens, the engine had {sum(found for _, _, found in rows) / prompts:.1%}")
    print(f"said too much: {over / prompts:.1%} of tokens, by more than a block for {beyond[0]} prompts")
    print(f"said too little: {under / prompts:.1%} of tokens, by more than a block for {beyond[1]} prompts")


if __name__ == "__main__":
    main()
