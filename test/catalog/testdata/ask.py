# Asks the catalog's servers what is on standard input, a JSON object a line:
# {"op": method, "params": {...}, "server": 0 or 1} or {"wait": waiter, "params": {...}},
# and answers with a line of JSON each: {"ok": answer} or {"code": ..., "message": ...}.
import datetime, json, os, sys, time
import boto3
from botocore.exceptions import ClientError, WaiterError

clients = [boto3.client("ec2", endpoint_url=url) for url in os.environ["INSTAR_URLS"].split()]


def plain(v):
    if isinstance(v, datetime.datetime):
        return v.isoformat()
    raise TypeError(v)


for line in sys.stdin:
    asked = json.loads(line)
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
    print(json.dumps(answer, default=plain), flush=True)
