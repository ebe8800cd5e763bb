package imds

import (
	"fmt"
	"strings"
	"testing"
)

// spoof is an attempt to be somebody else, or to have more of oneself than is
// due.
type spoof struct {
	name    string
	guest   int
	forge   string   // a source address that is not the guest's
	args    []string // of curl; the URL is instance-id's over IPv4 if none has "://"
	want    string   // how the answer begins
	cut     bool     // or the connection is reset before it is read, for what came behind the refused line
	prepare func()
}

// TestSpoofing has a router with three instances and a stranger behind it: one
// instance known by its interface alone, one by interface and addresses, one on
// a bridge by address and MAC address; the stranger is on that bridge.
func TestSpoofing(t *testing.T) {
	host := newNetns(t)
	host.run(t, nil, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	host.ip(t, "link", "add", "br2", "type", "bridge")
	host.ip(t, "link", "set", "br2", "up")
	guests := make([]netns, 4)
	network := []string{"tap0", "tap1", "br2", "br2"}
	for i := range guests {
		guests[i] = newNetns(t)
		link(t, host, fmt.Sprintf("tap%d", i), guests[i], "eth0")
		if i >= 2 {
			host.ip(t, "link", "set", fmt.Sprintf("tap%d", i), "master", "br2")
		}
		guests[i].ip(t, "link", "set", "eth0", "address", fmt.Sprintf("02:00:00:00:00:0%d", i))
		subnet := min(i, 2)
		guests[i].ip(t, "address", "add", fmt.Sprintf("10.0.%d.%d/24", subnet, 2+i), "dev", "eth0")
		guests[i].ip(t, "-6", "address", "add", fmt.Sprintf("fd00:%d::%d/64", subnet, 2+i), "dev", "eth0", "nodad")
		guests[i].ip(t, "route", "add", "169.254.169.254/32", "dev", "eth0")
		guests[i].ip(t, "-6", "route", "add", "fd00:ec2::254/128", "dev", "eth0")
		guests[i].ip(t, "route", "add", "default", "via", fmt.Sprintf("10.0.%d.1", subnet))
	}
	var args []string
	for i, dev := range network[:3] {
		host.ip(t, "address", "add", fmt.Sprintf("10.0.%d.1/24", i), "dev", dev)
		host.ip(t, "-6", "address", "add", fmt.Sprintf("fd00:%d::1/64", i), "dev", dev, "nodad")
		host.ip(t, "address", "add", "169.254.169.254/32", "dev", dev)
		host.ip(t, "-6", "address", "add", "fd00:ec2::254/128", "dev", dev, "nodad")
		host.ip(t, "-6", "address", "add", "fe80::a9fe:a9fe/64", "dev", dev, "nodad")
		args = append(args, "--listen", "169.254.169.254@"+dev, "--listen", "[fd00:ec2::254]:80@"+dev, "--listen", "[fe80::a9fe:a9fe]:80@"+dev)
	}
	s := serve(t, host, map[string]string{
		"0.yaml": "instance-id: i-0\ncaller: {listener: tap0}\n",
		"1.yaml": "instance-id: i-1\ncaller: {listener: tap1, addresses: [10.0.1.3, 'fd00:1::3']}\n",
		"2.yaml": "instance-id: i-2\ncaller: {listener: br2, addresses: [10.0.2.4, 'fd00:2::4'], mac: '02:00:00:00:00:02'}\n",
	}, args...)
	tokens := make([]string, 3)
	for i := range tokens {
		if got, want := guests[i].curl(t, url4+instanceID), fmt.Sprintf("200 i-%d", i); got != want {
			t.Fatalf("guest %d is %q", i, got)
		}
		tokens[i] = strings.TrimPrefix(guests[i].curl(t, "-X", "PUT", "-H", ttl, url4+putToken), "200 ")
	}
	for _, g := range guests[:2] { // link-local addresses are usable after a moment
		g.run(t, nil, "sh", "-c", "until ip -6 address show dev eth0 scope link -tentative | grep -q inet6; do sleep 0.1; done")
	}
	const url6, local6, token = "http://[fd00:ec2::254]" + instanceID, "http://[fe80::a9fe:a9fe%eth0]" + instanceID, "X-aws-ec2-metadata-token: "
	header := func(h ...string) (args []string) {
		for _, one := range h {
			args = append(args, "-H", one)
		}
		return args
	}
	const arp = `
import socket, struct
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(("eth0", 0))
me, ip = bytes.fromhex("020000000003"), socket.inet_aton("10.0.2.4")
for op in (1, 2) * 5: # announce the neighbour's address as ours
    s.send(b"\xff" * 6 + me + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x800, 6, 4, op) + me + ip + b"\xff" * 6 + ip)
`
	cases := []spoof{
		// 1-5: whoever is behind tap0 is instance 0, by whatever address.
		{name: "instance 1's address", guest: 0, forge: "10.0.1.3", want: "200 i-0"},
		{name: "instance 2's address", guest: 0, forge: "10.0.2.4", want: "200 i-0"},
		{name: "an address of nobody's", guest: 0, forge: "192.0.2.7", want: "200 i-0"},
		{name: "instance 1's IPv6 address", guest: 0, forge: "fd00:1::3", args: []string{url6}, want: "200 i-0"},
		{name: "an IPv6 link-local address", guest: 0, args: []string{local6}, want: "200 i-0"},
		// 6-14: headers that proxies set name nobody.
		{name: "X-Forwarded-For", guest: 0, args: header("X-Forwarded-For: 10.0.1.3"), want: "200 i-0"},
		{name: "two X-Forwarded-For", guest: 0, args: header("X-Forwarded-For: 10.0.1.3", "X-Forwarded-For: 10.0.2.4"), want: "200 i-0"},
		{name: "X-Real-IP", guest: 0, args: header("X-Real-IP: 10.0.1.3"), want: "200 i-0"},
		{name: "Forwarded", guest: 0, args: header("Forwarded: for=10.0.1.3;by=10.0.1.1"), want: "200 i-0"},
		{name: "X-Instance-ID", guest: 0, args: header("X-Instance-ID: i-1", "X-Tenant-ID: x", "X-Instance-ID-Signature: x"), want: "200 i-0"},
		{name: "X-OVN-Network-ID", guest: 0, args: header("X-Neutron-Network-ID: 1", "X-OVN-Network-ID: 1"), want: "200 i-0"},
		{name: "X-Client-IP", guest: 0, args: header("X-Client-IP: 10.0.1.3", "True-Client-IP: 10.0.1.3"), want: "200 i-0"},
		{name: "Via", guest: 0, args: header("Via: 1.1 10.0.1.3"), want: "200 i-0"},
		{name: "the PROXY protocol", guest: 0, args: []string{"--haproxy-protocol"}, want: "400", cut: true},
		// 15-19: names for the server.
		{name: "a rebound name", guest: 0, args: header("Host: rebound.example.org"), want: "421"},
		{name: "a name that begins like the address", guest: 0, args: header("Host: 169.254.169.254.example.org"), want: "421"},
		{name: "a name with user and port", guest: 0, args: header("Host: localhost@rebound.example.org:80"), want: "4"},
		{name: "another instance's address as target", guest: 0, args: []string{"--request-target", "http://10.0.1.3" + instanceID}, want: "200 i-0"},
		{name: "a rebound name as target", guest: 0, args: []string{"--request-target", "http://rebound.example.org" + instanceID}, want: "421"},
		// 20-23: tokens of others.
		{name: "instance 1's token", guest: 0, args: header(token + tokens[1]), want: "401"},
		{name: "instance 1's token from its address", guest: 0, forge: "10.0.1.3", args: header(token + tokens[1]), want: "401"},
		{name: "a token through a proxy", guest: 0, args: []string{"-X", "PUT", "-H", ttl, "-H", "X-Forwarded-For: 10.0.0.2", url4 + putToken}, want: "403"},
		{name: "instance 0's token at instance 1", guest: 1, args: header(token + tokens[0]), want: "401"},
		// 24-29: on tap1 only the record's addresses are anybody's.
		{name: "instance 0's address", guest: 1, forge: "10.0.0.2", want: "404"},
		{name: "instance 2's address on tap1", guest: 1, forge: "10.0.2.4", want: "404"},
		{name: "a neighbouring address", guest: 1, forge: "10.0.1.77", want: "404"},
		{name: "instance 2's IPv6 address", guest: 1, forge: "fd00:2::4", args: []string{url6}, want: "404"},
		{name: "a link-local address that no record has", guest: 1, args: []string{local6}, want: "404"},
		{name: "the router's address on another interface", guest: 1, args: []string{"http://10.0.0.1" + instanceID}, want: "error 7"},
		// 30-35: on the bridge.
		{name: "a stranger", guest: 3, want: "404"},
		{name: "a stranger with instance 2's token", guest: 3, args: header(token + tokens[2]), want: "404"},
		{name: "a stranger who announces instance 2's address", guest: 3, forge: "10.0.2.4", want: "404", prepare: func() {
			guests[2].ip(t, "link", "set", "eth0", "down")
			guests[3].run(t, nil, "python3", "-c", arp)
		}},
		{name: "the same with its token", guest: 3, forge: "10.0.2.4", args: header(token + tokens[2]), want: "404"},
		{name: "a stranger with instance 2's IPv6 address", guest: 3, forge: "fd00:2::4", args: []string{url6}, want: "404", prepare: func() {
			host.ip(t, "-6", "neigh", "flush", "dev", "br2")
		}},
		{name: "instance 2 with another network card", guest: 2, want: "404", prepare: func() {
			guests[2].ip(t, "link", "set", "eth0", "address", "02:00:00:00:00:99", "up")
			guests[2].ip(t, "route", "replace", "169.254.169.254/32", "dev", "eth0")
			host.ip(t, "neigh", "flush", "dev", "br2")
		}},
	}
	for i, c := range cases {
		if c.prepare != nil {
			c.prepare()
		}
		args := c.args
		if !strings.Contains(strings.Join(args, " "), url4) && !strings.Contains(strings.Join(args, " "), "http://[") && !strings.Contains(strings.Join(args, " "), "http://10.0.0.1/") {
			args = append(args, url4+instanceID)
		}
		undo := func() {}
		if c.forge != "" {
			family, size := "-4", "/32"
			if strings.Contains(c.forge, ":") {
				family, size = "-6", "/128"
			}
			add := []string{family, "address", "add", c.forge + size, "dev", "eth0"}
			if family == "-6" {
				add = append(add, "nodad")
			}
			guests[c.guest].ip(t, add...)
			host.ip(t, family, "route", "replace", c.forge+size, "dev", network[c.guest])
			undo = func() {
				host.ip(t, family, "route", "del", c.forge+size, "dev", network[c.guest])
				guests[c.guest].ip(t, family, "address", "del", c.forge+size, "dev", "eth0")
			}
			args = append([]string{"--interface", c.forge}, args...)
		}
		if got := guests[c.guest].curl(t, args...); !strings.HasPrefix(got, c.want) && !(c.cut && got == "error 56") {
			t.Errorf("case %d, guest %d, %s: %q, want %q", i+1, c.guest, c.name, got, c.want)
		}
		undo()
	}
	// Whoever they are, they are still themselves.
	guests[2].ip(t, "link", "set", "eth0", "address", "02:00:00:00:00:02")
	host.ip(t, "neigh", "flush", "dev", "br2")
	for i := range 3 {
		if got, want := guests[i].curl(t, url4+instanceID), fmt.Sprintf("200 i-%d", i); got != want {
			t.Errorf("guest %d is %q afterwards", i, got)
		}
	}
	if out := s.log(t, "MAC address is not instance i-2's"); !strings.Contains(out, "MAC address is not instance i-2's") {
		t.Error("the access log does not tell of the forged MAC address")
	}
	t.Logf("%d cases", len(cases))
	if len(cases) < 30 {
		t.Errorf("%d cases are fewer than the 30 that are promised", len(cases))
	}
}
