package metadata

import (
	"context"
	"errors"
	"net"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

// fakeConn is a connection that came from somewhere on some listener.
type fakeConn struct {
	net.Conn
	from netip.AddrPort
}

func (c fakeConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.from) }

type table map[string]string // "iface addr": mac

func (n table) MAC(iface string, addr netip.Addr) (string, error) {
	mac, ok := n[iface+" "+addr.String()]
	if !ok {
		return "", errors.New("no entry")
	}
	return mac, nil
}

// TestCallers finds instances by address, listener and MAC, and never by
// what a header says.
func TestCallers(t *testing.T) {
	addrs := func(a ...string) (out []netip.Addr) {
		for _, s := range a {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	h := newHandler(t, Options{Neighbours: table{"br0 10.0.1.1": "02:00:00:00:00:01", "br0 10.0.1.2": "02:00:00:00:00:bb"}},
		&Instance{ID: "i-addr", Caller: Caller{Addresses: addrs("10.0.0.1", "2001:db8::1", "fe80::5%tap5")}},
		&Instance{ID: "i-tap1", Caller: Caller{Listener: "tap1"}},
		&Instance{ID: "i-tap2", Caller: Caller{Listener: "tap2", Addresses: addrs("10.0.0.2", "fe80::2")}},
		&Instance{ID: "i-tap2b", Caller: Caller{Listener: "tap2", Addresses: addrs("10.0.0.3")}},
		&Instance{ID: "i-mac1", Caller: Caller{Addresses: addrs("10.0.1.1"), MAC: "02:00:00:00:00:01"}},
		&Instance{ID: "i-mac2", Caller: Caller{Addresses: addrs("10.0.1.2"), MAC: "02:00:00:00:00:02"}},
		&Instance{ID: "i-mac3", Caller: Caller{Addresses: addrs("10.0.1.3"), MAC: "02:00:00:00:00:03"}},
	)
	for _, c := range []struct{ from, listener, iface, want string }{
		{"10.0.0.1", "", "", "i-addr"},
		{"10.0.0.1", "main", "", "i-addr"},
		{"::ffff:10.0.0.1", "main", "", "i-addr"},
		{"2001:db8::1", "main", "", "i-addr"},
		{"2001:db8::2", "main", "", ""},
		{"fe80::5%tap5", "main", "", "i-addr"},
		{"fe80::5%tap6", "main", "", ""},
		{"fe80::5", "main", "", ""},
		{"10.0.0.9", "main", "", ""},
		{"10.0.0.9", "tap1", "", "i-tap1"},
		{"10.0.0.9", "metadata-1", "tap1", "i-tap1"},
		{"fe80::9%tap1", "main", "", "i-tap1"},
		{"10.0.0.1", "tap1", "", "i-tap1"}, // a forged source is still who it is
		{"10.0.0.2", "main", "", ""},       // tap2's address elsewhere
		{"10.0.0.2", "tap2", "", "i-tap2"},
		{"fe80::2%tap2", "main", "", "i-tap2"},
		{"10.0.0.3", "x", "tap2", "i-tap2b"},
		{"10.0.0.1", "tap2", "", ""}, // forged: tap2 serves only its own
		{"10.0.0.9", "tap2", "", ""},
		{"10.0.1.1", "main", "br0", "i-mac1"},
		{"10.0.1.2", "main", "br0", ""}, // its MAC is another's
		{"10.0.1.3", "main", "br0", ""}, // not in the table
		{"10.0.1.1", "main", "br1", ""}, // nor on that interface
	} {
		r := httptest.NewRequest("GET", instanceID, nil)
		r.Host = "169.254.169.254"
		conn := fakeConn{from: netip.AddrPortFrom(netip.MustParseAddr(c.from), 1000)}
		r = r.WithContext(ConnContext(context.Background(), conn, c.listener, c.iface))
		r.RemoteAddr = "10.0.0.1:1" // what a middleware might have put there
		for _, name := range []string{"X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Instance-ID", "X-Forwarded-Host", "X-Tenant-ID", "True-Client-IP", "Client-IP", "Via"} {
			r.Header.Set(name, "10.0.0.1")
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		got := w.Body.String()
		if w.Code != 200 {
			got = ""
		}
		if got != c.want || (w.Code != 200 && w.Code != 404) {
			t.Errorf("from %s on %s/%s: %d %q, want %q", c.from, c.listener, c.iface, w.Code, got, c.want)
		}
	}
}

func TestSetConflicts(t *testing.T) {
	on := func(id, listener string, addrs ...string) *Instance {
		in := &Instance{ID: id, Caller: Caller{Listener: listener}}
		for _, a := range addrs {
			in.Caller.Addresses = append(in.Caller.Addresses, netip.MustParseAddr(a))
		}
		return in
	}
	for _, c := range []struct {
		name      string
		instances []*Instance
		want      []string // of the error; none: no error
	}{
		{"same id", []*Instance{on("i-1", "", "10.0.0.1"), on("i-1", "", "10.0.0.2")}, []string{`"i-1" is used by two`}},
		{"same address", []*Instance{on("i-1", "", "10.0.0.1"), on("i-2", "", "10.0.0.2", "10.0.0.1")}, []string{"10.0.0.1", "i-1", "i-2"}},
		{"mapped address", []*Instance{on("i-1", "", "10.0.0.1"), on("i-2", "", "::ffff:10.0.0.1")}, []string{"10.0.0.1"}},
		{"same listener", []*Instance{on("i-1", "tap1"), on("i-2", "tap1")}, []string{"tap1"}},
		{"whole listener beside an address", []*Instance{on("i-1", "tap1"), on("i-2", "tap1", "10.0.0.2")}, []string{"tap1", "10.0.0.2"}},
		{"two things", []*Instance{on("i-1", "", "10.0.0.1"), on("i-1", "", "10.0.0.2"), on("i-2", "", "10.0.0.1"), {ID: "i/3", Caller: Caller{Listener: "x"}}}, []string{"two records", "10.0.0.1", `"i/3"`}},
		{"same address, other listener", []*Instance{on("i-1", "tap1", "10.0.0.1"), on("i-2", "tap2", "10.0.0.1"), on("i-3", "", "10.0.0.1")}, nil},
		{"one address twice", []*Instance{on("i-1", "", "10.0.0.1", "10.0.0.1")}, nil},
	} {
		_, err := NewSet(c.instances...)
		if (err != nil) != (c.want != nil) {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not say %q", c.name, err, w)
			}
		}
	}
}

func TestHosts(t *testing.T) {
	h := newHandler(t, Options{Hosts: []string{"metadata.example.org"}}, small("i-1", fullAddr))
	for host, code := range map[string]int{
		"169.254.169.254": 200, "169.254.169.254:80": 200, "[fd00:ec2::254]": 200, "[fd00:ec2::254]:80": 200, "fd00:ec2::254": 200,
		"": 200, "localhost": 200, "localhost:8080": 200, "instance-data": 200, "instance-data.": 200, "instance-data.:8773": 200,
		"INSTANCE-DATA": 200, "instance-data.ec2.internal": 200, "metadata.example.org": 200, "METADATA.example.org.:80": 200,
		"evil.example.org": 421, "169.254.169.254.evil.example.org": 421, "evil.example.org:80": 421, "localhost.evil.example.org": 421,
		"[evil]": 421, "instance-data.evil.example.org": 421, "@169.254.169.254": 421,
	} {
		r := httptest.NewRequest("GET", instanceID, nil)
		r.Host, r.RemoteAddr = host, fullAddr+":1"
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != code {
			t.Errorf("Host %q: %d, want %d", host, w.Code, code)
		}
	}
}

// TestRateLimit limits each instance by itself, and strangers together.
func TestRateLimit(t *testing.T) {
	h := newHandler(t, Options{Rate: 0.001, Burst: 3}, small("i-1", "10.0.0.1"), small("i-2", "10.0.0.2"))
	var got []int
	for _, from := range []string{"10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.9", "10.0.0.8", "10.0.0.7", "10.0.0.6"} {
		got = append(got, ask(h, from, "GET", instanceID).Code)
	}
	want := []int{200, 200, 200, 429, 200, 404, 404, 404, 429}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
}

type reports []Request

func (r *reports) Request(q *Request) { *r = append(*r, *q) }

// TestReports checks what a reporter is told, and that no secret is in it.
func TestReports(t *testing.T) {
	var got reports
	h := newHandler(t, Options{Reporter: &got}, full(t))
	tok := token(t, h, fullAddr)
	ask(h, fullAddr, "GET", instanceID, tokHeader+": "+tok)
	ask(h, fullAddr, "GET", instanceID+"?token="+tok, tokHeader+": nonsense")
	ask(h, fullAddr, "GET", "/latest/user-data")
	ask(h, fullAddr, "GET", "/latest/meta-data/iam/security-credentials/web-role")
	ask(h, "10.9.9.9", "GET", "/"+strings.Repeat("x", 1000))
	var lines []string
	for _, q := range got {
		if q.Start.IsZero() || q.Duration <= 0 {
			t.Errorf("no times in %+v", q)
		}
		lines = append(lines, strings.Join([]string{q.Instance, q.Caller.String(), q.Method, q.Path, q.Token, q.Note}, " "))
		for _, secret := range []string{tok, "nonsense", "secret-1", "token-1", "echo hello"} {
			if strings.Contains(lines[len(lines)-1], secret) {
				t.Errorf("a report holds %q", secret)
			}
		}
	}
	want := []string{
		"i-0abc1234def567890 192.0.2.10:40000 PUT /latest/api/token issued ",
		"i-0abc1234def567890 192.0.2.10:40000 GET /latest/meta-data/instance-id valid ",
		"i-0abc1234def567890 192.0.2.10:40000 GET /latest/meta-data/instance-id bad token wrong, expired or another instance's",
		"i-0abc1234def567890 192.0.2.10:40000 GET /latest/user-data none ",
		"i-0abc1234def567890 192.0.2.10:40000 GET /latest/meta-data/iam/security-credentials/web-role none ",
		" 10.9.9.9:40000 GET /" + strings.Repeat("x", 255) + "  no instance has this caller",
	}
	for i, w := range want {
		if i >= len(lines) || lines[i] != w {
			t.Fatalf("report %d: got %q, want %q", i, lines, w)
		}
	}
	if got[3].Status != 200 || got[3].Bytes != 21 || got[5].Status != 404 {
		t.Errorf("statuses and sizes: %+v", got)
	}
}
