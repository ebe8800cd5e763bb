package imds

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

const (
	url4       = "http://169.254.169.254"
	instanceID = "/latest/meta-data/instance-id"
	putToken   = "/latest/api/token"
	ttl        = "X-aws-ec2-metadata-token-ttl-seconds: 60"
)

// TestInterfaces gives three instances, that all have the same address, an
// interface of the host each: every one sees itself alone, whatever source
// address and headers it makes up.
func TestInterfaces(t *testing.T) {
	host := newNetns(t)
	records := map[string]string{
		"far.yaml":  "instance-id: i-far\ncaller: {addresses: [10.9.0.9, 10.0.0.77]}\n",
		"tap3.yaml": "instance-id: i-tap3\ncaller: {listener: tap3, addresses: [10.0.0.3, 'fe80::3']}\n",
	}
	var args []string
	guests := make([]netns, 4)
	for i := range guests {
		tap := fmt.Sprintf("tap%d", i)
		guests[i] = newNetns(t)
		link(t, host, tap, guests[i], "eth0")
		host.ip(t, "address", "add", "169.254.169.254/32", "dev", tap)
		guests[i].ip(t, "route", "add", "169.254.169.254/32", "dev", "eth0")
		args = append(args, "--listen", "169.254.169.254@"+tap)
		if i < 3 {
			records[tap+".yaml"] = fmt.Sprintf("instance-id: i-%s\ncaller: {listener: %s}\nuser-data: secret of %d\n", tap, tap, i)
			guests[i].ip(t, "address", "add", "10.0.0.2/24", "dev", "eth0")
		}
	}
	guests[3].ip(t, "address", "add", "10.0.0.3/24", "dev", "eth0")
	args = append(args, "--listen", "[fe80::a9fe:a9fe]:80@tap1")
	// Answers to equal addresses find their way because the connection's
	// socket is bound to its interface.
	for i := range guests {
		host.ip(t, "route", "add", "10.0.0.0/24", "dev", fmt.Sprintf("tap%d", i), "metric", fmt.Sprint(100+i))
	}
	host.ip(t, "address", "add", "fe80::a9fe:a9fe/64", "dev", "tap1", "nodad")
	s := serve(t, host, records, args...)
	tokens := make([]string, 3)
	for i := range 3 {
		me := fmt.Sprintf("200 i-tap%d", i)
		if got := guests[i].curl(t, url4+instanceID); got != me {
			t.Errorf("guest %d is %q", i, got)
		}
		if got := guests[i].curl(t, url4+"/latest/user-data"); got != fmt.Sprintf("200 secret of %d", i) {
			t.Errorf("guest %d has user data %q", i, got)
		}
		for _, header := range []string{"X-Forwarded-For: 10.9.0.9", "X-Real-IP: 10.9.0.9", "Forwarded: for=10.9.0.9", "X-Instance-ID: i-far", "Host: localhost", "X-Forwarded-Host: i-far"} {
			if got := guests[i].curl(t, "-H", header, url4+instanceID); got != me {
				t.Errorf("guest %d with %s is %q", i, header, got)
			}
		}
		// Forged addresses: the far instance's and a neighbour's.
		for _, forged := range []string{"10.9.0.9", "10.0.0.3", "10.0.0.77"} {
			guests[i].ip(t, "address", "add", forged+"/32", "dev", "eth0")
			host.ip(t, "route", "add", forged+"/32", "dev", fmt.Sprintf("tap%d", i))
			if got := guests[i].curl(t, "--interface", forged, url4+instanceID); got != me {
				t.Errorf("guest %d with the address %s is %q", i, forged, got)
			}
			host.ip(t, "route", "del", forged+"/32", "dev", fmt.Sprintf("tap%d", i))
			guests[i].ip(t, "address", "del", forged+"/32", "dev", "eth0")
		}
		tokens[i] = strings.TrimPrefix(guests[i].curl(t, "-X", "PUT", "-H", ttl, url4+putToken), "200 ")
		if got := guests[i].curl(t, "-H", "Host: rebound.example.org", url4+instanceID); !strings.HasPrefix(got, "421") {
			t.Errorf("guest %d by a name of its own choice: %q", i, got)
		}
	}
	for i := range 3 {
		for j := range 3 {
			want := "401"
			if i == j {
				want = "200"
			}
			if got := guests[i].curl(t, "-H", "X-aws-ec2-metadata-token: "+tokens[j], url4+instanceID); !strings.HasPrefix(got, want) {
				t.Errorf("guest %d with guest %d's token: %q", i, j, got)
			}
		}
	}
	// A listener with addresses: only these, and a source that is elsewhere
	// somebody's is nobody's here.
	if got := guests[3].curl(t, url4+instanceID); got != "200 i-tap3" {
		t.Errorf("guest 3 is %q", got)
	}
	for _, forged := range []string{"10.9.0.9", "10.0.0.2", "10.0.0.77"} {
		guests[3].ip(t, "address", "add", forged+"/32", "dev", "eth0")
		host.ip(t, "route", "replace", forged+"/32", "dev", "tap3")
		if got := guests[3].curl(t, "--interface", forged, url4+instanceID); !strings.HasPrefix(got, "404") {
			t.Errorf("guest 3 with the address %s is %q", forged, got)
		}
		host.ip(t, "route", "del", forged+"/32", "dev", "tap3")
	}
	// IPv6 link-local: the interface says who it is.
	guests[1].run(t, nil, "sh", "-c", "until ip -6 address show dev eth0 scope link -tentative | grep -q inet6; do sleep 0.1; done")
	if got := guests[1].curl(t, "http://[fe80::a9fe:a9fe%eth0]"+instanceID); got != "200 i-tap1" {
		t.Errorf("guest 1 over IPv6 link-local is %q", got)
	}
	if out := s.log(t, `"listener":"tap1"`); strings.Contains(out, tokens[0]) || !strings.Contains(out, `"listener":"tap1"`) {
		t.Errorf("the access log lacks listeners or holds tokens")
	}
}

// TestBridge has two instances on one bridge, told apart by address and MAC
// address: taking the other's address is of no use.
func TestBridge(t *testing.T) {
	host := newNetns(t)
	host.ip(t, "link", "add", "br0", "type", "bridge")
	host.ip(t, "link", "set", "br0", "up")
	host.ip(t, "address", "add", "10.0.0.1/24", "dev", "br0")
	host.ip(t, "address", "add", "169.254.169.254/32", "dev", "br0")
	records := make(map[string]string)
	guests := make([]netns, 3)
	for i := range guests {
		guests[i] = newNetns(t)
		port := fmt.Sprintf("port%d", i)
		link(t, host, port, guests[i], "eth0")
		host.ip(t, "link", "set", port, "master", "br0")
		guests[i].ip(t, "link", "set", "eth0", "address", fmt.Sprintf("02:00:00:00:00:1%d", i))
		guests[i].ip(t, "address", "add", fmt.Sprintf("10.0.0.1%d/24", i), "dev", "eth0")
		guests[i].ip(t, "route", "add", "169.254.169.254/32", "dev", "eth0")
		records[fmt.Sprintf("%d.yaml", i)] = fmt.Sprintf("instance-id: i-%d\ncaller: {addresses: [10.0.0.1%d], mac: '02:00:00:00:00:1%d'}\n", i, i, i)
	}
	serve(t, host, records, "--listen", "169.254.169.254@br0")
	for i, g := range guests {
		if got := g.curl(t, url4+instanceID); got != fmt.Sprintf("200 i-%d", i) {
			t.Errorf("guest %d is %q", i, got)
		}
	}
	// Guest 0 goes away; guest 1 takes its address.
	guests[0].ip(t, "link", "set", "eth0", "down")
	guests[1].ip(t, "address", "add", "10.0.0.10/24", "dev", "eth0")
	host.ip(t, "neigh", "flush", "dev", "br0")
	if got := guests[1].curl(t, "--interface", "10.0.0.10", url4+instanceID); !strings.HasPrefix(got, "404") {
		t.Errorf("guest 1 with guest 0's address is %q", got)
	}
	if got := guests[1].curl(t, url4+instanceID); got != "200 i-1" {
		t.Errorf("guest 1 afterwards is %q", got)
	}
}

// TestHopLimit puts a router between the server and instances: answers to
// token requests cross it only with a limit of 2.
func TestHopLimit(t *testing.T) {
	host, router, guest := newNetns(t), newNetns(t), newNetns(t)
	link(t, host, "inner", router, "outer")
	link(t, router, "inner", guest, "eth0")
	for _, c := range []struct {
		ns   netns
		args string
	}{
		{host, "address add 10.1.0.1/24 dev inner"},
		{host, "address add 169.254.169.254/32 dev lo"},
		{host, "-6 address add fd00:1::1/64 dev inner nodad"},
		{host, "-6 address add fd00:ec2::254/128 dev lo nodad"},
		{router, "address add 10.1.0.2/24 dev outer"},
		{router, "address add 10.2.0.1/24 dev inner"},
		{router, "-6 address add fd00:1::2/64 dev outer nodad"},
		{router, "-6 address add fd00:2::1/64 dev inner nodad"},
		{router, "route add 169.254.169.254 via 10.1.0.1"},
		{router, "-6 route add fd00:ec2::254 via fd00:1::1"},
		{host, "route add 10.2.0.0/24 via 10.1.0.2"},
		{host, "-6 route add fd00:2::/64 via fd00:1::2"},
	} {
		c.ns.ip(t, strings.Fields(c.args)...)
	}
	router.run(t, nil, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	records := make(map[string]string)
	for i := 1; i <= 2; i++ {
		guest.ip(t, "address", "add", fmt.Sprintf("10.2.0.1%d/24", i), "dev", "eth0")
		guest.ip(t, "-6", "address", "add", fmt.Sprintf("fd00:2::1%d/64", i), "dev", "eth0", "nodad")
		records[fmt.Sprintf("%d.yaml", i)] = fmt.Sprintf("instance-id: i-%d\ncaller: {addresses: [10.2.0.1%d, 'fd00:2::1%d']}\nmetadata-options: {http-put-response-hop-limit: %d}\n", i, i, i, i)
	}
	guest.ip(t, "route", "add", "169.254.169.254", "via", "10.2.0.1")
	guest.ip(t, "-6", "route", "add", "fd00:ec2::254", "via", "fd00:2::1")
	// An instance that is the server's neighbour, with a limit of 1.
	near := newNetns(t)
	link(t, host, "near", near, "eth0")
	host.ip(t, "address", "add", "10.3.0.1/24", "dev", "near")
	near.ip(t, "address", "add", "10.3.0.2/24", "dev", "eth0")
	near.ip(t, "route", "add", "169.254.169.254", "via", "10.3.0.1")
	records["near.yaml"] = "instance-id: i-near\ncaller: {addresses: [10.3.0.2]}\n"
	serve(t, host, records, "--listen", "169.254.169.254", "--listen", "[fd00:ec2::254]")
	if got := near.curl(t, "-X", "PUT", "-H", ttl, url4+putToken); !strings.HasPrefix(got, "200 ") {
		t.Errorf("a neighbour's token: %q", got)
	}
	for i := 1; i <= 2; i++ {
		for _, c := range []struct{ from, url string }{{fmt.Sprintf("10.2.0.1%d", i), url4}, {fmt.Sprintf("fd00:2::1%d", i), "http://[fd00:ec2::254]"}} {
			if got := guest.curl(t, "--interface", c.from, c.url+instanceID); got != fmt.Sprintf("200 i-%d", i) {
				t.Errorf("GET from %s: %q", c.from, got)
			}
			want, patience := "200 ", "20"
			if i == 1 {
				want, patience = "error 28", "3" // the answer does not arrive
			}
			if got := guest.curl(t, "--max-time", patience, "--interface", c.from, "-X", "PUT", "-H", ttl, c.url+putToken); !strings.HasPrefix(got, want) {
				t.Errorf("PUT token from %s with a hop limit of %d: %q", c.from, i, got)
			}
		}
	}
}

// TestActivation takes its sockets from a parent that has systemd's manners,
// and tells it about itself.
func TestActivation(t *testing.T) {
	ns := newNetns(t)
	ns.ip(t, "address", "add", "169.254.169.254/32", "dev", "lo")
	s := &service{ns: ns, dir: t.TempDir()}
	out := ns.run(t, nil, "python3", "-c", activationScript, instar, s.dir)
	var got struct{ Body, Notified string }
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got.Body != "i-sock" {
		t.Errorf("the instance is %q", got.Body)
	}
	for _, want := range []string{"READY=1", "STATUS=serving 1 instances", "WATCHDOG=1", "STOPPING=1"} {
		if !strings.Contains(got.Notified, want) {
			t.Errorf("systemd was not told %s: %q", want, got.Notified)
		}
	}
}

// activationScript plays systemd: it binds the socket, hands it over as file
// descriptor 3 named "web", asks once, and stops the server.
const activationScript = `
import json, os, signal, socket, sys, time, urllib.request
program, dir = sys.argv[1:]
os.mkdir(dir + "/instances")
open(dir + "/instances/a.yaml", "w").write("instance-id: i-sock\ncaller: {listener: web}\n")
note = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); note.bind(dir + "/notify"); note.settimeout(20)
sock = socket.socket(); sock.bind(("169.254.169.254", 80)); sock.listen(16)
pid = os.fork()
if pid == 0:
    os.dup2(sock.fileno(), 3); os.set_inheritable(3, True)
    env = dict(os.environ, LISTEN_FDS="1", LISTEN_FDNAMES="web", LISTEN_PID=str(os.getpid()), NOTIFY_SOCKET=dir + "/notify", WATCHDOG_USEC="400000")
    os.execve(program, [program, "metadata", "serve", "--instances", dir + "/instances", "--state", dir + "/state", "--control", dir + "/ctl", "--access-log", "none", "--listen", "169.254.169.254"], env) # which the socket serves already
sock.close()
notified = ""
def until(word):
    global notified
    while word not in notified:
        notified += note.recv(4096).decode() + "\n"
until("READY=1")
body = urllib.request.urlopen("http://169.254.169.254/latest/meta-data/instance-id").read().decode()
until("WATCHDOG=1")
os.kill(pid, signal.SIGTERM)
until("STOPPING=1")
_, status = os.waitpid(pid, 0)
if status: sys.exit("the server ended with %d" % status)
print(json.dumps({"body": body, "notified": notified}))
`
