"""Peer: FastAPI on uvicorn, one worker, httptools, uvloop, as their documentation shows it; no
access log.
"""

import sys

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from job import PATH, Job

app = FastAPI()
job = Job()


@app.post(PATH)
async def receive(request: Request):
    """Take a delivery."""
    status, answer = job.take(await request.body(), request.headers)
    if status != 200:
        raise HTTPException(status)
    return answer


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http="httptools",
        loop="uvloop",
        access_log=False,
        log_level="warning",
    )
