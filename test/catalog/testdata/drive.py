"""Drives every action of the catalog's EC2 API, every parameter of the service's
model once, and holds every answer to the model: what is in it must be named
there. The client is boto3's botocore or, with INSTAR_CLIENT=cli, the AWS command
line, command after command in this one process. The last line of output is a
report in JSON."""

import base64
import collections
import contextlib
import copy
import datetime
import io
import json
import os
import sys
import time
import xml.etree.ElementTree as ET

CLI = os.environ.get("INSTAR_CLIENT") == "cli"
if CLI:
    import awscli.clidriver  # first: it brings a botocore of its own

import botocore.httpsession
import botocore.session
from botocore import xform_name
from botocore.config import Config
from botocore.exceptions import ClientError, WaiterError

URL, URL2 = os.environ["INSTAR_URL"], os.environ["INSTAR_URL2"]
LOCATION, BUCKET, OTHER = os.environ["INSTAR_LOCATION"], os.environ["INSTAR_BUCKET"], os.environ["INSTAR_OTHER"]
REGION = os.environ["AWS_REGION"]
BOB, ALICE = "222233334444", "111122223333"

calls = collections.Counter()
faults = []
last = {}


def fault(text):
    faults.append(text)
    print("FAULT", text, file=sys.stderr)


send = botocore.httpsession.URLLib3Session.send


def recording(self, request):
    answer = send(self, request)
    last["body"], last["status"], last["type"] = answer.content, answer.status_code, answer.headers.get("content-type")
    return answer


botocore.httpsession.URLLib3Session.send = recording

# What the model of Debian's botocore is too old for: as the current one has it.
driver = awscli.clidriver.create_clidriver() if CLI else None
session = driver.session if CLI else botocore.session.get_session()
loader = session.get_component("data_loader")
model = loader.load_service_model("ec2", "service-2")
shapes, operations = model["shapes"], model["operations"]


def member(shape, name, target, **more):
    shapes[shape].setdefault("members", {}).setdefault(name, dict({"shape": target}, **more))


def operation(name, extra=None, result="Boolean", required=("ImageId",)):
    if name in operations:
        return
    members = {"ImageId": {"shape": "String"}, "DryRun": {"shape": "Boolean"}}
    members.update(extra or {})
    shapes[name + "Request"] = {"type": "structure", "required": list(required), "members": members}
    shapes[name + "Result"] = {"type": "structure", "members": {"Return": {"shape": result, "locationName": "return"}}}
    operations[name] = {"name": name, "http": {"method": "POST", "requestUri": "/"}, "input": {"shape": name + "Request"}, "output": {"shape": name + "Result"}}


operation("EnableImage")
operation("DisableImage")
operation("EnableImageDeregistrationProtection", {"WithCooldown": {"shape": "Boolean"}}, "String")
operation("DisableImageDeregistrationProtection", None, "String")
specs = {"locationName": "TagSpecification"}
member("RegisterImageRequest", "TagSpecifications", "TagSpecificationList", **specs)
member("CopyImageRequest", "TagSpecifications", "TagSpecificationList", **specs)
member("DescribeImagesRequest", "IncludeDisabled", "Boolean")
member("DescribeImagesRequest", "MaxResults", "Integer")
member("DescribeImagesRequest", "NextToken", "String")
member("DescribeImagesResult", "NextToken", "String", locationName="nextToken")
member("ModifyImageAttributeRequest", "ImdsSupport", "AttributeValue")
member("Image", "DeregistrationProtection", "String", locationName="deregistrationProtection")
member("Image", "ImdsSupport", "String", locationName="imdsSupport")
for name in ("SourceImageId", "SourceImageRegion", "SourceInstanceId", "LastLaunchedTime"):
    member("Image", name, "String", locationName=name[0].lower() + name[1:])
member("ImageAttribute", "DeregistrationProtection", "AttributeValue", locationName="deregistrationProtection")
member("DeregisterImageRequest", "DeleteAssociatedSnapshots", "Boolean")
if "output" not in operations["DeregisterImage"]:
    shapes["DeregisterImageResult"] = {"type": "structure", "members": {"Return": {"shape": "Boolean", "locationName": "return"}}}
    operations["DeregisterImage"]["output"] = {"shape": "DeregisterImageResult"}
shapes["DeleteSnapshotResult"] = {"type": "structure", "members": {"SnapshotId": {"shape": "String", "locationName": "snapshotId"}}}
shapes["DeleteSnapshotResultSet"] = {"type": "list", "member": {"shape": "DeleteSnapshotResult", "locationName": "item"}}
member("DeregisterImageResult", "DeleteSnapshotResults", "DeleteSnapshotResultSet", locationName="deleteSnapshotResultSet")
if "output" not in operations["DeleteKeyPair"]:
    shapes["DeleteKeyPairResult"] = {"type": "structure", "members": {
        "Return": {"shape": "Boolean", "locationName": "return"}, "KeyPairId": {"shape": "String", "locationName": "keyPairId"}}}
    operations["DeleteKeyPair"]["output"] = {"shape": "DeleteKeyPairResult"}
service = session.get_service_model("ec2")


class Command:
    """Command is a client whose calls are command lines of aws."""

    def __init__(self, key, secret, url, region, name):
        self.key = key, secret
        self.place = ["--endpoint-url", url, "--region", region, "--output", "json"]
        self.name = name

    def aws(self, *args):
        """aws runs a command line and gives what it printed, or raises what it said."""
        session.set_credentials(*self.key)
        out, err = io.StringIO(), io.StringIO()
        out.buffer = io.BytesIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            rc = driver.main(list(args) + self.place)
        said = err.getvalue()
        if "An error occurred (" in said:
            code, _, message = said.split("An error occurred (", 1)[1].partition(")")
            raise ClientError({"Error": {"Code": code, "Message": message}}, args[1])
        if rc:
            raise WaiterError(args[1], said, {}) if args[1] == "wait" else RuntimeError(said)
        return out.getvalue() + out.buffer.getvalue().decode()

    def __getattr__(self, name):
        def run(**params):
            def plain(v):
                if isinstance(v, bytes):
                    return base64.b64encode(v).decode()
                return v.isoformat() + "Z" if isinstance(v, datetime.datetime) else str(v)
            text = self.aws(self.name, name.replace("_", "-"), "--cli-input-json", json.dumps(params, default=plain))
            return json.loads(text) if text.strip() else {}
        return run


def client(key="AKALICE", secret="alice-secret-key", url=URL, region=REGION, name="ec2"):
    if CLI:
        return Command(key, secret, url, region, name)
    return session.create_client(
        name, region_name=region, endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret,
        config=Config(retries={"max_attempts": 0}, parameter_validation=False, connect_timeout=60, read_timeout=120))


ec2, reader, bob = client(), client("AKREADER", "reader-secret-key"), client("AKBOB", "bob-secret-key")
there = client(url=URL2, region=OTHER)


def local(tag):
    return tag.rsplit("}", 1)[-1]


def hold(action, element, shape, path):
    """hold says what of an answer the model does not know."""
    if shape.type_name == "structure":
        known = {m.serialization.get("name", n): m for n, m in shape.members.items()}
        for child in element:
            name = local(child.tag)
            if path == action + "Response" and name in ("requestId", "return") and name not in known:
                continue
            if name not in known:
                fault("%s: the answer has %s/%s, which the model does not know" % (action, path, name))
                continue
            hold(action, child, known[name], path + "/" + name)
    elif shape.type_name == "list":
        for child in element:
            if local(child.tag) != "item":
                fault("%s: %s has %s, not item" % (action, path, local(child.tag)))
            hold(action, child, shape.member, path + "/item")
    elif len(element):
        fault("%s: %s is a %s and has elements" % (action, path, shape.type_name))


def call(action, params, code=None, by=None):
    """call makes a call that must end with an error code, or well."""
    by = by or ec2
    calls[action] += 1
    try:
        answer = getattr(by, xform_name(action))(**params)
    except ClientError as e:
        got = e.response["Error"]["Code"]
        if got != code:
            fault("%s(%s): %s: %s; want %s" % (action, params, got, e.response["Error"]["Message"], code))
        root = ET.fromstring(last["body"])
        if local(root.tag) != "Response" or root.find("RequestID") is None:
            fault("%s: the error is %s" % (action, last["body"]))
        return None
    if code:
        fault("%s(%s) was done; want %s" % (action, params, code))
    if last["type"] != "text/xml;charset=UTF-8":
        fault("%s: the answer is %s" % (action, last["type"]))
    root = ET.fromstring(last["body"])
    output = service.operation_model(action).output_shape
    if output is not None:
        hold(action, root, output, action + "Response")
    elif [local(c.tag) for c in root] != ["requestId", "return"]:
        fault("%s: the answer is %s" % (action, last["body"]))
    return answer


def leaves(shape, path=""):
    """leaves are the paths of all parameters of a request."""
    if shape.type_name == "structure":
        for name, m in shape.members.items():
            yield from leaves(m, path + "." + name if path else name)
    elif shape.type_name == "list":
        yield from leaves(shape.member, path + "[]")
    else:
        yield path


counter = 0


def fresh(what="image"):
    global counter
    counter += 1
    return "%s %d" % (what, counter)


def new_image(**more):
    params = dict({"Name": fresh(), "RootDeviceName": "/dev/sda1", "Architecture": "x86_64"}, **more)
    return call("RegisterImage", params)["ImageId"]


def new_key():
    return call("CreateKeyPair", {"KeyName": fresh("key"), "KeyType": "ed25519"})["KeyName"]


def described(image):
    return call("DescribeImages", {"ImageIds": [image]})["Images"][0]


public_key = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEX0n5xXGLzC5c5hTLsRzAbY2TrFwgsFUZzn2kP4yZcA me@example"
tag = {"Key": "k", "Value": "v"}
image_tags = [{"ResourceType": "image", "Tags": [tag]}]
key_tags = [{"ResourceType": "key-pair", "Tags": [tag]}]
policy = base64.b64encode(json.dumps({
    "expiration": "2099-01-01T00:00:00Z",
    "conditions": [{"acl": "ec2-bundle-read"}, {"bucket": BUCKET}, ["starts-with", "$key", "p"]],
}).encode())
tomorrow = (datetime.datetime.utcnow() + datetime.timedelta(days=1)).replace(microsecond=0)
instances = iter("i-a%d" % n for n in range(1, 1000))
known = new_image()
MISSING = "UnknownParameter"  # what there is none of here
OUTPOST = "arn:aws:outposts:eu-home-1:111122223333:outpost/op-1"


def device(**more):
    return [dict({"DeviceName": "/dev/sdb"}, **more)]


def volume(**more):
    return device(Ebs=dict({"VolumeSize": 8}, **more))


def devices():
    """devices are the parameters of a block device mapping."""
    p = "BlockDeviceMappings[]."
    return {
        p + "DeviceName": device(VirtualName="ephemeral0"), p + "VirtualName": device(VirtualName="ephemeral1"), p + "NoDevice": device(NoDevice=""),
        p + "Ebs.DeleteOnTermination": volume(DeleteOnTermination=False), p + "Ebs.Iops": volume(VolumeType="io1", Iops=100),
        p + "Ebs.SnapshotId": volume(SnapshotId="snap-0123456789abcdef0"), p + "Ebs.VolumeSize": volume(), p + "Ebs.VolumeType": volume(VolumeType="gp3"),
        p + "Ebs.KmsKeyId": volume(Encrypted=True, KmsKeyId="k"), p + "Ebs.Throughput": volume(VolumeType="gp3", Throughput=125),
        p + "Ebs.OutpostArn": (volume(OutpostArn=OUTPOST), MISSING), p + "Ebs.Encrypted": volume(Encrypted=True),
    }


def specified(prefix="TagSpecifications[].", value=image_tags):
    return {prefix + "ResourceType": value, prefix + "Tags[].Key": value, prefix + "Tags[].Value": value}


def launch(value):
    return {"LaunchPermission": value}


# For each action: what every call of it has, and for each parameter of the model
# a value, or a value and the code that is the right answer. A dict in place of a
# value is merged into the call.
class Also(dict):
    pass


filters = {"Filters[].Name": [{"Name": "name", "Values": ["*"]}], "Filters[].Values[]": [{"Name": "name", "Values": ["im?ge*", "\\*"]}]}


def named(name, value="*"):
    f = [{"Name": name, "Values": [value]}]
    return {"Filters[].Name": f, "Filters[].Values[]": f}


table = {
    "RegisterImage": (lambda: {"Name": fresh(), "RootDeviceName": "/dev/sda1"}, dict({
        "ImageLocation": LOCATION, "Architecture": "arm64", "Description": "d", "EnaSupport": True, "KernelId": "aki-0123456789abcdef0",
        "Name": "a-name (1) [2] ./-'@_", "BillingProducts[]": ["b"], "RamdiskId": "ari-0123456789abcdef0", "RootDeviceName": "/dev/xvda",
        "SriovNetSupport": "simple", "VirtualizationType": "hvm", "BootMode": "uefi", "TpmSupport": Also(TpmSupport="v2.0", BootMode="uefi"),
        "UefiData": Also(UefiData="QU1aTg==", BootMode="uefi"), "ImdsSupport": "v2.0",
    }, **devices(), **specified())),
    "CreateImage": (lambda: {"Name": fresh(), "InstanceId": next(instances)}, dict({
        "Description": "d", "InstanceId": "i-a0", "Name": "made of a machine", "NoReboot": True,
    }, **devices(), **specified())),
    "CopyImage": (lambda: {"Name": fresh(), "SourceImageId": source, "SourceRegion": REGION}, dict({
        "ClientToken": "a-token", "Description": "d", "Encrypted": (False, None), "KmsKeyId": ("k", "InvalidParameterCombination"), "Name": "copied",
        "SourceImageId": lambda: source, "SourceRegion": ("moon-1", "InvalidParameterValue"), "CopyImageTags": True,
        "DestinationOutpostArn": (OUTPOST, MISSING),
    }, **specified())),
    "DeregisterImage": (lambda: {"ImageId": new_image()}, {"ImageId": new_image, "DeleteAssociatedSnapshots": True}),
    "DescribeImages": (lambda: {}, dict({
        "ExecutableUsers[]": ["self"], "ImageIds[]": [known], "Owners[]": ["self", BOB, "nobody"], "IncludeDeprecated": True, "IncludeDisabled": True,
        "MaxResults": 5, "NextToken": ("AAAA", "InvalidPaginationToken"),
    }, **filters)),
    "DescribeImageAttribute": (lambda: {"ImageId": known, "Attribute": "description"}, {"Attribute": "launchPermission", "ImageId": known}),
    "ModifyImageAttribute": (lambda: {"ImageId": known}, {
        "Attribute": Also(Attribute="description", Value="by name"), "Value": Also(Attribute="description", Value="by name"),
        "Description.Value": {"Value": "by structure"}, "ImageId": Also(Description={"Value": ""}), "ImdsSupport.Value": {"Value": "v2.0"},
        "LaunchPermission.Add[].Group": {"Add": [{"Group": "all"}]}, "LaunchPermission.Add[].UserId": {"Add": [{"UserId": BOB}, {"UserId": "3333-4444-5555"}]},
        "LaunchPermission.Add[].OrganizationArn": {"Add": [{"OrganizationArn": "arn:aws:organizations::111122223333:organization/o-abcdefghij"}]},
        "LaunchPermission.Add[].OrganizationalUnitArn": {"Add": [{"OrganizationalUnitArn": "arn:aws:organizations::111122223333:ou/o-abcdefghij/ou-ab12-abcdefgh"}]},
        "LaunchPermission.Remove[].Group": {"Remove": [{"Group": "all"}]}, "LaunchPermission.Remove[].UserId": {"Remove": [{"UserId": BOB}]},
        "LaunchPermission.Remove[].OrganizationArn": {"Remove": [{"OrganizationArn": "arn:aws:organizations::111122223333:organization/o-abcdefghij"}]},
        "LaunchPermission.Remove[].OrganizationalUnitArn": {"Remove": [{"OrganizationalUnitArn": "arn:aws:organizations::111122223333:ou/o-abcdefghij/ou-ab12-abcdefgh"}]},
        "OperationType": Also(Attribute="launchPermission", OperationType="add", UserIds=[BOB]), "ProductCodes[]": ["774F4FF8"],
        "UserGroups[]": Also(OperationType="add", UserGroups=["all"]), "UserIds[]": Also(OperationType="remove", UserIds=[BOB]),
        "OrganizationArns[]": Also(OperationType="add", OrganizationArns=["arn:aws:organizations::111122223333:organization/o-abcdefghij"]),
        "OrganizationalUnitArns[]": Also(OperationType="add", OrganizationalUnitArns=["arn:aws:organizations::111122223333:ou/o-abcdefghij/ou-ab12-abcdefgh"]),
    }),
    "ResetImageAttribute": (lambda: {"ImageId": known, "Attribute": "launchPermission"}, {"Attribute": ("kernel", "InvalidParameterValue"), "ImageId": known}),
    "EnableImage": (lambda: {"ImageId": known}, {"ImageId": known}),
    "DisableImage": (lambda: {"ImageId": new_image()}, {"ImageId": new_image}),
    "EnableImageDeprecation": (lambda: {"ImageId": known, "DeprecateAt": tomorrow}, {"ImageId": known, "DeprecateAt": tomorrow + datetime.timedelta(days=300)}),
    "DisableImageDeprecation": (lambda: {"ImageId": known}, {"ImageId": known}),
    "EnableImageDeregistrationProtection": (lambda: {"ImageId": new_image()}, {"ImageId": new_image, "WithCooldown": True}),
    "DisableImageDeregistrationProtection": (lambda: {"ImageId": known}, {"ImageId": known}),
    "CancelImageLaunchPermission": (lambda: {"ImageId": shared()}, {"ImageId": lambda: shared()}),
    "CreateTags": (lambda: {"Resources": [known], "Tags": [tag]}, {
        "Resources[]": [known, new_image()], "Tags[].Key": [{"Key": "a"}, {"Key": "ü"}], "Tags[].Value": [{"Key": "b", "Value": "<&>\"'"}]}),
    "DeleteTags": (lambda: {"Resources": [known], "Tags": [tag]}, {"Resources[]": [known], "Tags[].Key": [{"Key": "a"}], "Tags[].Value": [{"Key": "b", "Value": ""}]}),
    "DescribeTags": (lambda: {}, dict({"MaxResults": 5, "NextToken": ("AAAA", "InvalidPaginationToken")}, **named("resource-id"))),
    "CreateKeyPair": (lambda: {"KeyName": fresh("key"), "KeyType": "ed25519"}, dict({
        "KeyName": "a-key", "KeyType": "rsa", "KeyFormat": "pem"}, **specified(value=key_tags))),
    "ImportKeyPair": (lambda: {"KeyName": fresh("key"), "PublicKeyMaterial": public_key}, dict({
        "KeyName": "imported", "PublicKeyMaterial": (b"no key", "InvalidKey.Format")}, **specified(value=key_tags))),
    "DescribeKeyPairs": (lambda: {}, dict({
        "KeyNames[]": lambda: [new_key()], "KeyPairIds[]": lambda: [call("ImportKeyPair", {"KeyName": fresh("key"), "PublicKeyMaterial": public_key})["KeyPairId"]],
        "IncludePublicKey": True}, **named("key-name"))),
    "DeleteKeyPair": (lambda: {}, {
        "KeyName": new_key, "KeyPairId": lambda: call("ImportKeyPair", {"KeyName": fresh("key"), "PublicKeyMaterial": public_key})["KeyPairId"]}),
    "DescribeRegions": (lambda: {}, dict({"RegionNames[]": [REGION], "AllRegions": True}, **named("region-name"))),
    "DescribeAvailabilityZones": (lambda: {}, dict({
        "ZoneNames[]": [REGION + "a"], "ZoneIds[]": [REGION + "a"], "AllAvailabilityZones": True}, **named("zone-name"))),
    "BundleInstance": (lambda: {"InstanceId": next(instances), "Storage": {"S3": {"Bucket": BUCKET, "Prefix": "p"}}}, {
        "InstanceId": "i-abc", "Storage.S3.Bucket": {"S3": {"Bucket": BUCKET + "/folder", "Prefix": "p"}}, "Storage.S3.Prefix": {"S3": {"Bucket": BUCKET, "Prefix": "q"}},
        "Storage.S3.AWSAccessKeyId": {"S3": {"Bucket": BUCKET, "Prefix": "p", "AWSAccessKeyId": "AKALICE"}},
        "Storage.S3.UploadPolicy": {"S3": {"Bucket": BUCKET, "Prefix": "p", "AWSAccessKeyId": "AKALICE", "UploadPolicy": base64.b64decode(policy), "UploadPolicySignature": "x"}},
        "Storage.S3.UploadPolicySignature": ({"S3": {"Bucket": BUCKET, "Prefix": "p", "AWSAccessKeyId": "AKALICE", "UploadPolicySignature": "x"}}, None if CLI else "InvalidParameterCombination")}),
    "DescribeBundleTasks": (lambda: {}, dict({"BundleIds[]": lambda: [bundling()]}, **named("state"))),
    "CreateStoreImageTask": (lambda: {"ImageId": source, "Bucket": BUCKET + "/" + fresh("stored").replace(" ", "-")}, {
        "ImageId": lambda: source, "Bucket": BUCKET + "/" + "by-bucket", "S3ObjectTags[].Key": [{"Key": "keep", "Value": "10 years: more"}],
        "S3ObjectTags[].Value": [{"Key": "k", "Value": ""}]}),
    "DescribeStoreImageTasks": (lambda: {}, dict({
        "ImageIds[]": lambda: [source], "MaxResults": 1, "NextToken": ("AAAA", "InvalidPaginationToken")}, **named("task-state"))),
    "CreateRestoreImageTask": (lambda: {"Bucket": BUCKET, "ObjectKey": stored_key(), "Name": fresh("restored")}, dict({
        "Bucket": (BUCKET + "/nowhere", "InvalidParameterValue"), "ObjectKey": lambda: stored_key(), "Name": "restored by name"}, **specified())),
    "CancelBundleTask": (lambda: {"BundleId": bundling()}, {"BundleId": lambda: bundling()}),
}


def bundling():
    return call("BundleInstance", {"InstanceId": next(instances), "Storage": {"S3": {"Bucket": BUCKET, "Prefix": "p"}}})["BundleTask"]["BundleId"]


def stored(**more):
    """stored has the image stored, and gives its task when that has ended."""
    call("CreateStoreImageTask", dict({"ImageId": source, "Bucket": BUCKET}, **more))
    prefix = more.get("Bucket", BUCKET).partition("/")[2]
    for _ in range(600):
        tasks = call("DescribeStoreImageTasks", {"ImageIds": [source]})["StoreImageTaskResults"]
        for t in tasks:
            if t["S3objectKey"] == (prefix + "/" if prefix else "") + source + ".bin" and t["StoreTaskState"] != "InProgress":
                return t
        time.sleep(0.2)
    fault("the image is not stored: %s" % tasks)


keys = []


def stored_key():
    """stored_key is the key of an object to restore from; it is there once."""
    if not keys:
        keys.append(stored()["S3objectKey"])
    return keys[0]


def shared():
    i = call("RegisterImage", {"Name": fresh(), "RootDeviceName": "/dev/sda1"})["ImageId"]
    call("ModifyImageAttribute", {"ImageId": i, "LaunchPermission": {"Add": [{"UserId": BOB}]}})
    return i


source = call("RegisterImage", {"Name": "of a bundle", "ImageLocation": LOCATION})["ImageId"]

for action, (base, values) in table.items():
    by = {"CancelImageLaunchPermission": bob, "CopyImage": there}.get(action)
    shape = service.operation_model(action).input_shape
    for path in leaves(shape):
        if path == "DryRun":
            continue
        if path not in values:
            fault("%s: no value for %s" % (action, path))
            continue
        value, code = values[path] if isinstance(values[path], tuple) else (values[path], None)
        if callable(value):
            value = value()
        params = base()
        if isinstance(value, Also):
            params.update(copy.deepcopy(value))
        else:
            params[path.split(".")[0].split("[")[0]] = copy.deepcopy(value)
        if "ImageLocation" in params:
            params.pop("RootDeviceName", None)
        call(action, params, code, by)
    for path in values:
        if path not in set(leaves(shape)):
            print("not in this model:", action, path, file=sys.stderr)
    params = base()
    if action == "DeleteKeyPair":
        params = {"KeyName": "a-key"}
    if action == "ModifyImageAttribute":
        params["Description"] = {"Value": "x"}
    call(action, dict(params, DryRun=True), "DryRunOperation", by)
    if not action.startswith("Describe"):
        call(action, dict(params), "UnauthorizedOperation", reader if by is None else client("AKREADER", "reader-secret-key", url=URL2, region=OTHER) if by is there else reader)

# What an image's answer holds is what was registered.
image = call("RegisterImage", {
    "Name": "all of it", "Description": "<b>d</b> & \u00fc", "Architecture": "x86_64", "RootDeviceName": "/dev/sda1", "VirtualizationType": "hvm",
    "EnaSupport": True, "SriovNetSupport": "simple", "BootMode": "uefi", "TpmSupport": "v2.0", "ImdsSupport": "v2.0", "KernelId": "aki-0123456789abcdef0",
    "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8, "VolumeType": "gp3", "SnapshotId": "snap-0123456789abcdef0", "DeleteOnTermination": False}},
                            {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}, {"DeviceName": "/dev/sdc", "NoDevice": ""}],
    "TagSpecifications": image_tags})["ImageId"]
got = described(image)
want = {
    "ImageId": image, "Name": "all of it", "Description": "<b>d</b> & \u00fc", "Architecture": "x86_64", "RootDeviceName": "/dev/sda1", "RootDeviceType": "ebs",
    "VirtualizationType": "hvm", "EnaSupport": True, "SriovNetSupport": "simple", "BootMode": "uefi", "TpmSupport": "v2.0", "ImdsSupport": "v2.0",
    "KernelId": "aki-0123456789abcdef0", "State": "available", "OwnerId": ALICE, "Public": False, "Hypervisor": "xen", "ImageType": "machine", "Tags": [tag],
    "BlockDeviceMappings": [
        {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8, "VolumeType": "gp3", "SnapshotId": "snap-0123456789abcdef0", "DeleteOnTermination": False, "Encrypted": False}},
        {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}, {"DeviceName": "/dev/sdc", "NoDevice": ""}],
    "DeregistrationProtection": "disabled",
}
for k, v in want.items():
    if got.get(k) != v:
        fault("DescribeImages: %s is %r, want %r" % (k, got.get(k), v))
for attribute in service.shape_for("ImageAttributeName").enum + ["deregistrationProtection", "imdsSupport"]:
    call("DescribeImageAttribute", {"ImageId": image, "Attribute": attribute})
    call("DescribeImageAttribute", {"ImageId": image, "Attribute": attribute}, "InvalidAMIID.NotFound", bob)

# Every filter of the model, by what this image has.
have = {
    "architecture": "x86_64", "block-device-mapping.delete-on-termination": "false", "block-device-mapping.device-name": "/dev/sdb",
    "block-device-mapping.snapshot-id": "snap-*", "block-device-mapping.volume-size": "8", "block-device-mapping.volume-type": "gp?",
    "block-device-mapping.encrypted": "false", "creation-date": "20*", "description": "<b>*", "ena-support": "true", "hypervisor": "xen", "image-id": image,
    "image-type": "machine", "is-public": "false", "kernel-id": "aki-*", "name": "all of it", "owner-id": ALICE, "root-device-name": "/dev/sda1",
    "root-device-type": "ebs", "state": "available", "sriov-net-support": "simple", "tag:k": "v", "tag-key": "k", "tag-value": "v", "virtualization-type": "hvm",
}
have_not = ["manifest-location", "platform", "product-code", "product-code.type", "ramdisk-id", "source-image-id", "source-image-region", "source-instance-id",
            "state-reason-code", "state-reason-message", "owner-alias"]
for name, value in have.items():
    found = call("DescribeImages", {"Owners": ["self"], "Filters": [{"Name": name, "Values": [value]}, {"Name": "image-id", "Values": [image]}]})["Images"]
    if [i["ImageId"] for i in found] != [image]:
        fault("filter %s=%s finds %d images" % (name, value, len(found)))
for name in have_not:
    found = call("DescribeImages", {"Owners": ["self"], "Filters": [{"Name": name, "Values": ["x"]}, {"Name": "image-id", "Values": [image]}]})["Images"]
    if found:
        fault("filter %s=x finds %d images" % (name, len(found)))
call("DescribeImages", {"Filters": [{"Name": "colour", "Values": ["red"]}]}, "InvalidParameterValue")

# Pages, by botocore's own paginator where its model has one.
seen, token = [], None
while True:
    answer = call("DescribeImages", dict({"Owners": ["self"], "MaxResults": 7}, **({"NextToken": token} if token else {})))
    seen += [i["ImageId"] for i in answer["Images"]]
    token = answer.get("NextToken")
    if not token:
        break
everything = [i["ImageId"] for i in call("DescribeImages", {"Owners": ["self"]})["Images"]]
if seen != everything or len(everything) < 20:
    fault("%d images on pages, %d at once" % (len(seen), len(everything)))
paged = [] if CLI else [t["ResourceId"] for p in ec2.get_paginator("describe_tags").paginate(PaginationConfig={"PageSize": 5}) for t in p["Tags"]]
if CLI:
    paged = [t["ResourceId"] for t in json.loads(ec2.aws("ec2", "describe-tags", "--page-size", "5"))["Tags"]]
if sorted(paged) != sorted(t["ResourceId"] for t in call("DescribeTags", {})["Tags"]):
    fault("%d tags on pages" % len(paged))


# Waiters: a copy becomes available when it is there, and what fails fails.
def wait(by, name, ok=True, **params):
    calls["wait " + name] += 1
    try:
        if CLI:
            (option, values), = params.items()
            by.aws("ec2", "wait", name.replace("_", "-"), "--" + xform_name(option, "-"), *values)
        else:
            by.get_waiter(name).wait(WaiterConfig={"Delay": 1, "MaxAttempts": 120}, **params)
        done = True
    except WaiterError as e:
        done = False
        if ok:
            fault("wait %s: %s" % (name, e))
    if done and not ok:
        fault("wait %s was done" % name)


token = "4f6a0a3e-8a7e-4c8e-9a53-5f6d6c5b1c11"
copied = call("CopyImage", {"Name": "with a token", "SourceImageId": source, "SourceRegion": REGION, "ClientToken": token}, by=there)["ImageId"]
again = call("CopyImage", {"Name": "with a token", "SourceImageId": source, "SourceRegion": REGION, "ClientToken": token}, by=there)["ImageId"]
if copied != again:
    fault("the same token made %s and %s" % (copied, again))
call("CopyImage", {"Name": "another name", "SourceImageId": source, "SourceRegion": REGION, "ClientToken": token}, "IdempotentParameterMismatch", there)
wait(there, "image_exists", ImageIds=[copied])
wait(there, "image_available", ImageIds=[copied])
got = call("DescribeImages", {"ImageIds": [copied]}, by=there)["Images"][0]
if got["SourceImageId"] != source or got["SourceImageRegion"] != REGION or got["RootDeviceType"] != "instance-store" or not got["ImageLocation"].endswith(".manifest.xml"):
    fault("the copy is %s" % got)
wait(ec2, "image_available", ImageIds=[image])
wait(ec2, "key_pair_exists", KeyNames=["a-key"])
pending = call("CreateImage", {"InstanceId": next(instances), "Name": "never taken"})["ImageId"]
if described(pending)["State"] != "pending" or described(pending)["SourceInstanceId"][:3] != "i-a":
    fault("an image on its way is %s" % described(pending))
task = bundling()
call("CancelBundleTask", {"BundleId": task})
wait(ec2, "bundle_task_complete", ok=False, BundleIds=[task])
call("DescribeBundleTasks", {"BundleIds": [task]}, "InvalidBundleId.NotFound", bob)

# An image as one object, and back.
t = stored(Bucket=BUCKET + "/tagged", S3ObjectTags=[{"Key": "keep", "Value": "10 years"}])
if t["StoreTaskState"] != "Completed" or t["ProgressPercentage"] != 100 or t["AmiId"] != source or t["Bucket"] != BUCKET or "StoreTaskFailureReason" in t:
    fault("a task that has ended is %s" % t)
restored = call("CreateRestoreImageTask", {"Bucket": BUCKET, "ObjectKey": t["S3objectKey"], "Name": "restored", "TagSpecifications": image_tags})["ImageId"]
wait(ec2, "image_available", ImageIds=[restored])
got, was = described(restored), described(source)
for k in ("Architecture", "RootDeviceType", "Hypervisor", "VirtualizationType", "Description", "BlockDeviceMappings"):
    if got.get(k) != was.get(k):
        fault("restored has %s %r, not %r" % (k, got.get(k), was.get(k)))
if restored == source or got["Name"] != "restored" or got["SourceImageId"] != source or got["SourceImageRegion"] != REGION or got["Tags"] != [tag] or got["ImageLocation"] == was["ImageLocation"]:
    fault("restored is %s" % got)
call("CreateRestoreImageTask", {"Bucket": BUCKET, "ObjectKey": t["S3objectKey"]}, "InvalidAMIName.Duplicate")
call("CreateRestoreImageTask", {"Bucket": BUCKET, "ObjectKey": "nothing.bin", "Name": "nothing"}, "InvalidParameterValue")
call("CreateRestoreImageTask", {"Bucket": BUCKET, "ObjectKey": "fleet/catalog/head", "Name": "no image"}, "InvalidParameterValue")
call("CreateStoreImageTask", {"ImageId": source, "Bucket": "cat-nowhere"}, "InvalidS3Bucket.NotFound")
call("CreateStoreImageTask", {"ImageId": source, "Bucket": "others"}, "AuthFailure")
call("CreateStoreImageTask", {"ImageId": source, "Bucket": "others", "DryRun": True}, "UnauthorizedOperation")
call("CreateStoreImageTask", {"ImageId": known, "Bucket": BUCKET}, "InvalidParameterValue")
call("CreateRestoreImageTask", {"Bucket": "others", "ObjectKey": "x"}, "AuthFailure")
call("DescribeStoreImageTasks", {"ImageIds": [source], "MaxResults": 5}, "InvalidParameterCombination")
call("DescribeStoreImageTasks", {"MaxResults": 201}, "InvalidParameterValue")
call("DescribeStoreImageTasks", {"Filters": [{"Name": "colour", "Values": ["red"]}]}, "InvalidParameterValue")
if call("DescribeStoreImageTasks", {}, by=bob)["StoreImageTaskResults"]:
    fault("another account is told of tasks")
seen, token = [], None
while True:
    answer = call("DescribeStoreImageTasks", dict({"MaxResults": 2}, **({"NextToken": token} if token else {})))
    seen += [x["S3objectKey"] for x in answer["StoreImageTaskResults"]]
    token = answer.get("NextToken")
    if not token:
        break
for bucket, state, want in (BUCKET, "Completed", True), ("other", "Completed", False), (BUCKET, "Failed", False):
    found = call("DescribeStoreImageTasks", {"Filters": [{"Name": "bucket", "Values": [bucket]}, {"Name": "task-state", "Values": [state]}]})["StoreImageTaskResults"]
    if (t["S3objectKey"] in [x["S3objectKey"] for x in found]) != want:
        fault("in %s, %s are %s" % (bucket, state, found))
if sorted(seen) != sorted(x["S3objectKey"] for x in call("DescribeStoreImageTasks", {})["StoreImageTaskResults"]) or len(seen) < 4:
    fault("%d tasks on pages" % len(seen))
print("STORED", BUCKET, t["S3objectKey"])

# What one may not see answers as what does not exist.
for action, params in {
    "DescribeImages": {"ImageIds": [image]}, "DescribeImageAttribute": {"ImageId": image, "Attribute": "description"}, "DeregisterImage": {"ImageId": image},
    "ModifyImageAttribute": {"ImageId": image, "Description": {"Value": "x"}}, "ResetImageAttribute": {"ImageId": image, "Attribute": "launchPermission"},
    "EnableImageDeprecation": {"ImageId": image, "DeprecateAt": tomorrow}, "DisableImage": {"ImageId": image}, "CancelImageLaunchPermission": {"ImageId": image},
    "CopyImage": {"SourceImageId": image, "SourceRegion": REGION, "Name": "mine"},
}.items():
    call(action, params, "InvalidAMIID.NotFound", bob)
    first = last["body"]
    never = json.loads(json.dumps(params, default=str).replace(image, "ami-00000000000000000"))
    call(action, never, "InvalidAMIID.NotFound", bob)

    def strip(body, image_id):
        root = ET.fromstring(body)
        root.find("RequestID").text = ""
        return ET.tostring(root).replace(image_id.encode(), b"ID")

    if strip(first, image) != strip(last["body"], "ami-00000000000000000"):
        fault("%s tells an image that is there from one that is not: %s, %s" % (action, first, last["body"]))

# STS, at the same endpoint.
calls["GetCallerIdentity"] += 1
if client(name="sts").get_caller_identity()["Account"] != ALICE:
    fault("GetCallerIdentity gives another account")

print(json.dumps({"Calls": sum(calls.values()), "Actions": calls}))
sys.exit(1 if faults else 0)
