package imds

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const sshKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEX0n5xXGLzC5c5hTLsRzAbY2TrFwgsFUZzn2kP4yZcA alice@example"

// webRecord is an instance as an operator would describe one.
const webRecord = `
instance-id: i-0abc1234def567890
caller: {addresses: [127.0.0.1, '::1', 169.254.169.254, 'fd00:ec2::254']}
launch-time: 2026-01-02T03:04:05Z
account-id: "123456789012"
ami-id: ami-0123456789abcdef0
instance-type: m1.small
hostname: web-1.example.org
reservation-id: r-1
public-keys:
  - {name: alice, key: "` + sshKey + `"}
  - {name: bob, key: "` + sshKey + `-too"}
interfaces:
  - mac: 02:00:00:00:00:0a
    local-ipv4s: [192.0.2.10]
    subnet-ipv4-cidr-block: 192.0.2.0/24
placement: {availability-zone: eu-test-1a}
block-device-mapping: {ami: sda1, root: /dev/sda1, ephemeral0: sdb}
security-groups: [default, web]
tags: {Name: web one, tier: front}
role:
  name: web-role
  static: {access-key-id: AKIAROLE, secret-access-key: role-secret, session-token: role-token}
user-data: |
  #!/bin/sh
  hostname >/var/lib/user-data-ran
  echo more >>/var/lib/user-data-ran
metadata-options:
  instance-metadata-tags: enabled
`

// cloud is a namespace where the metadata service is where clients expect it,
// and one instance on the same machine. extra are further lines of its record.
func cloud(t *testing.T, extra string) *service {
	t.Helper()
	ns := newNetns(t)
	ns.ip(t, "address", "add", "169.254.169.254/32", "dev", "lo")
	ns.ip(t, "-6", "address", "add", "fd00:ec2::254/128", "dev", "lo", "nodad")
	return serve(t, ns, map[string]string{"web.yaml": webRecord + extra}, "--listen", "169.254.169.254", "--listen", "[fd00:ec2::254]")
}

const tokensRequired = "  http-tokens: required\n" // continues metadata-options

// TestGoSDK is aws-sdk-go-v2 without its fallback to version 1, over both
// address families.
func TestGoSDK(t *testing.T) {
	s := cloud(t, tokensRequired)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"IPv4", "IPv6"} {
		var got map[string]string
		out := s.ns.run(t, []string{"INSTAR_TEST_SDK=" + mode, "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=" + mode}, self)
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{
			"instance": "i-0abc1234def567890", "zone": "eu-test-1a", "region": "eu-test-1", "chain-region": "eu-test-1",
			"profile": "arn:aws:iam::123456789012:instance-profile/web-role", "hostname": "web-1.example.org", "mac": "02:00:00:00:00:0a",
			"user-data": "#!/bin/sh\nhostname >/var/lib/user-data-ran\necho more >>/var/lib/user-data-ran\n", "key": "AKIAROLE",
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", mode, d)
		}
	}
}

// TestBotocore is Debian's botocore: its metadata fetchers and its default
// chain, and awscli on top.
func TestBotocore(t *testing.T) {
	s := cloud(t, tokensRequired)
	const script = `
import botocore.session, json
from botocore.utils import InstanceMetadataFetcher, InstanceMetadataRegionFetcher
keys = InstanceMetadataFetcher(timeout=5).retrieve_iam_role_credentials()
found = botocore.session.get_session().get_credentials()
print(json.dumps({"role": keys["role_name"], "key": keys["access_key"], "region": InstanceMetadataRegionFetcher(timeout=5).retrieve_region(),
  "chain": found.access_key, "method": found.method, "token": found.get_frozen_credentials().token}))
`
	want := `{"role": "web-role", "key": "AKIAROLE", "region": "eu-test-1", "chain": "AKIAROLE", "method": "iam-role", "token": "role-token"}` + "\n"
	if got := s.ns.run(t, nil, "/usr/bin/python3", "-c", script); got != want {
		t.Errorf("over IPv4: %s", got)
	}
	if got := s.ns.run(t, []string{"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6"}, "/usr/bin/python3", "-c", script); got != want {
		t.Errorf("over IPv6: %s", got)
	}
	out := s.ns.run(t, nil, "/usr/bin/aws", "configure", "list")
	for _, want := range []string{"iam-role", "imds", "eu-test-1"} {
		if !strings.Contains(out, want) {
			t.Errorf("aws configure list lacks %s:\n%s", want, out)
		}
	}
}

// TestNode is the AWS SDK for JavaScript, used as its README says: with a
// path that begins with two slashes by the time it is sent.
func TestNode(t *testing.T) {
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "instar", "npm")
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "@aws-sdk", "ec2-metadata-service")); err != nil {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		install := exec.Command("npm", "install", "--no-save", "--no-audit", "--no-fund", "@aws-sdk/ec2-metadata-service@3")
		install.Dir = dir
		if out, err := install.CombinedOutput(); err != nil {
			t.Fatalf("npm install: %v\n%s", err, out)
		}
	}
	s := cloud(t, tokensRequired)
	const script = `
const { MetadataService } = require(process.argv[1] + "/node_modules/@aws-sdk/ec2-metadata-service");
(async () => {
  const service = new MetadataService({});
  const token = await service.fetchMetadataToken();
  const list = await service.request("/latest/meta-data/", {});
  const id = await service.request("/latest/meta-data/instance-id", {});
  console.log(JSON.stringify({ token: token.length, listed: list.split("\n").includes("public-keys/"), id }));
})().catch((e) => { console.error(e); process.exit(1); });
`
	got := s.ns.run(t, nil, "node", "-e", script, dir)
	if want := `{"token":56,"listed":true,"id":"i-0abc1234def567890"}` + "\n"; got != want {
		t.Errorf("got %s", got)
	}
	if out := s.log(t, `"path":"//latest/meta-data/"`); !strings.Contains(out, `"path":"//latest/meta-data/"`) {
		t.Error("the SDK no longer sends two slashes: this test proves less than it says")
	}
}

// TestScripts are the two scripts that Debian has for people.
func TestScripts(t *testing.T) {
	s := cloud(t, "")
	guest := filepath.Join(unpack(t, "cloud-guest-utils"), "usr/bin/ec2metadata")
	got := s.ns.run(t, nil, guest)
	for _, want := range []string{
		"ami-id: ami-0123456789abcdef0", "availability-zone: eu-test-1a", "block-device-mapping: ", "instance-id: i-0abc1234def567890",
		"instance-type: m1.small", "local-hostname: web-1.example.org", "local-ipv4: 192.0.2.10", "security-groups: default", "public-keys: ", sshKey, "user-data: b'#!/bin/sh",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("ec2metadata lacks %q:\n%s", want, got)
		}
	}
	amazon := filepath.Join(unpack(t, "amazon-ec2-utils"), "usr/bin/ec2-metadata")
	for option, want := range map[string]string{
		"-i": "instance-id: i-0abc1234def567890", "-z": "placement: eu-test-1a", "-t": "instance-type: m1.small", "-o": "local-ipv4: 192.0.2.10",
		"-u": "keyname:alice\nindex:0\nformat:openssh-key\nkey:(begins from next line)\n" + sshKey, "-b": "ephemeral0: sdb", "-d": "echo more", "-s": "security-groups: default",
	} {
		if got := s.ns.run(t, nil, "bash", amazon, option); !strings.Contains(got, want) {
			t.Errorf("ec2-metadata %s lacks %q: %s", option, want, got)
		}
	}
}

// TestIdentity verifies the signed document the way Amazon's manual says,
// with openssl, against the certificate the server made on its first start.
func TestIdentity(t *testing.T) {
	s := cloud(t, "")
	const script = `
set -e
cd "$(mktemp -d)"; trap 'rm -rf "$PWD"' EXIT
get() { curl -gfsS "http://169.254.169.254/latest/dynamic/instance-identity/$1"; }
get document >document
for kind in pkcs7 rsa2048; do
  { echo "-----BEGIN PKCS7-----"; get $kind; echo; echo "-----END PKCS7-----"; } >$kind
  openssl smime -verify -in $kind -inform PEM -content document -certfile "$1" -noverify >out 2>log || { cat log; exit 1; }
  cmp document out
done
get signature | base64 -d >sig
openssl x509 -in "$1" -noout -pubkey >pub
openssl dgst -sha256 -verify pub -signature sig document
sed s/m1.small/m1.large/ document >forged
if openssl dgst -sha256 -verify pub -signature sig forged; then exit 1; fi
`
	out := s.ns.run(t, nil, "bash", "-c", script, "-", filepath.Join(s.dir, "state", "identity-cert.pem"))
	if !strings.Contains(out, "Verified OK") {
		t.Error(out)
	}
}
