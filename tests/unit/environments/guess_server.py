"""An MCP server over stdin and stdout, with a game: guess a number between 1 and 100."""

import json
import os
import random
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("guess")
game = {"number": 50, "last": 0}


@server.tool()
def new_game(seed: int) -> str:
    """Start a game."""
    game["number"], game["last"] = random.Random(seed).randint(1, 100), 0
    return "Guess my number between 1 and 100."


@server.tool()
def guess(n: int) -> str:
    """Say whether the number is higher or lower than n."""
    game["last"] = n
    if n == game["number"]:
        return "correct"
    return "higher" if game["number"] > n else "lower"


@server.tool()
def score() -> str:
    """Reward of the last guess."""
    hit = game["last"] == game["number"]
    return json.dumps({"reward": 1.0 if hit else 0.0, "done": hit, "success": hit})


@server.tool()
def pid() -> str:
    """Process id of the server."""
    return str(os.getpid())


@server.tool()
def hang() -> str:
    """Never answer."""
    time.sleep(3600)
    return "never"


if __name__ == "__main__":
    server.run()
