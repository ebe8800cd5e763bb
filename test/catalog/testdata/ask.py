# Asks the catalog's servers what is on standard input, a JSON object a line:
# {"n": number, "op": method, "params": {...}, "server": 0 or 1} or {"n": ..., "wait": waiter, "params": {...}},
# several at once, and answers with a line of JSON each: the number, and "ok" or "code" and "message".
import datetime, json, os, sys, threading
import boto3
from botocore.exceptions import ClientError, WaiterError

clients = [boto3.client("ec2", endpoint_url=url) for url in os.environ["INSTAR_URLS"].split()]


def plain(v):
    if isinstance(v, datetime.datetime):
        return v.isoformat()
    raise TypeError(v)


lock = threading.Lock()


def ask(asked):
    client = clients[asked.get("server", 0)]
    try:
        if "wait" in asked:
            out = client.get_waiter(asked["wait"]).wait(WaiterConfig={"Delay": 1, "MaxAttempts": 300}, **asked["params"])
        else:
            out = getattr(client, asked["op"])(**asked["params"])
            out.pop("ResponseMetadata")
        answer = {"ok": out}
    except ClientError as e:
        answer = {"code": e.response["Error"]["Code"], "message": e.response["Error"]["Message"]}
    except WaiterError as e:
        answer = {"code": "WaiterError", "message": str(e)}
    except Exception as e:  # the test is told, and does not wait for ever
        answer = {"code": type(e).__name__, "message": str(e)}
    answer["n"] = asked["n"]
    with lock:
        print(json.dumps(answer, default=plain), flush=True)


for line in sys.stdin:
    threading.Thread(target=ask, args=(json.loads(line),), daemon=True).start()
