package metadata

import (
	"context"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestTokens is the table of what IMDSv2 answers.
func TestTokens(t *testing.T) {
	required := full(t)
	required.Metadata.Tokens = "required"
	optional := small("i-optional", "192.0.2.20")
	off := small("i-off", "192.0.2.30")
	off.Metadata.Endpoint = "disabled"
	no6 := small("i-no6", "2001:db8::66")
	no6.Metadata.IPv6 = "disabled"
	h := newHandler(t, Options{}, required, optional, off, no6)
	const req, opt, dis = fullAddr, "192.0.2.20", "192.0.2.30"
	reqTok, optTok := token(t, h, req), token(t, h, opt)
	flip := func(s string, i int) string {
		b := []byte(s)
		if b[i] == 'A' {
			b[i] = 'B'
		} else {
			b[i] = 'A'
		}
		return string(b)
	}

	type tc struct {
		from, method, path string
		headers            []string
		code               int
	}
	cases := []tc{
		{req, "PUT", tokenPath, nil, 400},
		{req, "PUT", tokenPath + "/", []string{ttlHeader + ": 60"}, 200},
		{req, "PUT", "//latest//api//token", []string{ttlHeader + ": 60"}, 200},
		{req, "PUT", tokenPath, []string{ttlHeader + ": 60", ttlHeader + ": 60"}, 400},
		{req, "PUT", tokenPath, []string{ttlHeader + ": 60", ttlHeader + ": 61"}, 400},
		{req, "PUT", tokenPath, []string{strings.ToUpper(ttlHeader) + ": 60"}, 200},
		{req, "PUT", tokenPath + "?" + ttlHeader + "=60", nil, 400},
		{req, "PUT", "/2009-04-04/api/token", []string{ttlHeader + ": 60"}, 403},
		{req, "PUT", "/1.0/api/token", []string{ttlHeader + ": 60"}, 403},
		{req, "PUT", "/2021-03-23/api/token", []string{ttlHeader + ": 60"}, 403},
		{req, "PUT", "/1999-01-01/api/token", []string{ttlHeader + ": 60"}, 404},
		{req, "PUT", "/api/token", []string{ttlHeader + ": 60"}, 405},
		{req, "PUT", instanceID, []string{ttlHeader + ": 60"}, 405},
		{req, "OPTIONS", tokenPath, nil, 200},
		{req, "OPTIONS", instanceID, nil, 405},
		{dis, "PUT", tokenPath, []string{ttlHeader + ": 60"}, 403},
		{dis, "GET", instanceID, nil, 403},
		{dis, "GET", "/", nil, 403},
		{dis, "HEAD", "/latest/user-data", nil, 403},
		{"2001:db8::66", "GET", "/", nil, 403},
		{"2001:db8::66", "PUT", tokenPath, []string{ttlHeader + ": 60"}, 403},
		{"198.51.100.1", "GET", "/", nil, 404},
		{"198.51.100.1", "PUT", tokenPath, []string{ttlHeader + ": 60"}, 404},

		{req, "GET", instanceID, nil, 401},
		{req, "HEAD", instanceID, nil, 401},
		{req, "GET", "/", nil, 401},
		{req, "GET", "/latest", nil, 401},
		{req, "GET", "/latest/meta-data/", nil, 401},
		{req, "GET", "/latest/user-data", nil, 401},
		{req, "GET", "/no/such", nil, 401},
		{req, "GET", instanceID + "?" + tokHeader + "=" + reqTok, nil, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok}, 200},
		{req, "HEAD", instanceID, []string{tokHeader + ": " + reqTok}, 200},
		{req, "GET", "/", []string{tokHeader + ": " + reqTok}, 200},
		{req, "GET", "/no/such", []string{tokHeader + ": " + reqTok}, 404},
		{req, "GET", instanceID, []string{strings.ToUpper(tokHeader) + ": " + reqTok}, 200},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok, tokHeader + ": " + reqTok}, 200},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok, tokHeader + ": " + optTok}, 400},
		{req, "GET", instanceID, []string{tokHeader + ": " + optTok, tokHeader + ": " + reqTok}, 400},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok + "," + optTok}, 401},
		{req, "GET", instanceID, []string{tokHeader + ":"}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + optTok}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok + "A"}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok[1:]}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + strings.ToLower(reqTok)}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + strings.Repeat("A", 56)}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + strings.Repeat("!", 56)}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + strings.Repeat("A", 5600)}, 401},
		{req, "GET", instanceID, []string{"X-metadata-token: " + reqTok}, 401},
		{req, "GET", instanceID, []string{"Authorization: Bearer " + reqTok}, 401},
		{req, "GET", instanceID, []string{tokHeader + ": " + reqTok, "X-Forwarded-For: 203.0.113.9"}, 200},

		{opt, "GET", instanceID, nil, 200},
		{opt, "GET", instanceID, []string{tokHeader + ": " + optTok}, 200},
		{opt, "GET", instanceID, []string{tokHeader + ": " + reqTok}, 401},
		{opt, "GET", instanceID, []string{tokHeader + ": x"}, 401},
		{opt, "GET", instanceID, []string{tokHeader + ":"}, 401},
		{opt, "GET", "/", []string{tokHeader + ": x"}, 401},
	}
	for _, ttl := range []string{"", "0", "-1", "21601", "abc", "1.5", "0x10", " ", "+60", "99999999999999999999", "60s", "1e3", "６０"} {
		cases = append(cases, tc{req, "PUT", tokenPath, []string{ttlHeader + ": " + ttl}, 400})
	}
	for _, ttl := range []string{"1", "60", "21600", "0060"} {
		cases = append(cases, tc{req, "PUT", tokenPath, []string{ttlHeader + ": " + ttl}, 200})
	}
	for _, xff := range []string{"X-Forwarded-For: 203.0.113.9", "X-Forwarded-For:", "x-forwarded-for: a, b", "X-FORWARDED-FOR: " + req} {
		cases = append(cases, tc{req, "PUT", tokenPath, []string{ttlHeader + ": 60", xff}, 403})
	}
	for _, m := range []string{"GET", "HEAD", "POST", "DELETE", "PATCH", "TRACE", "PROPFIND"} {
		cases = append(cases, tc{req, m, tokenPath, []string{ttlHeader + ": 60"}, 405})
	}
	for _, m := range []string{"POST", "DELETE", "PATCH", "PUT", "TRACE", "CONNECT"} {
		cases = append(cases, tc{req, m, instanceID, []string{tokHeader + ": " + reqTok}, 405})
	}
	for i := range len(reqTok) {
		cases = append(cases, tc{req, "GET", instanceID, []string{tokHeader + ": " + flip(reqTok, i)}, 401})
	}
	for _, c := range cases {
		w := ask(h, c.from, c.method, c.path, c.headers...)
		if w.Code != c.code {
			t.Errorf("%s %s %s %q: %d, want %d", c.from, c.method, c.path, c.headers, w.Code, c.code)
		}
		if c.code == 405 && w.Header().Get("Allow") == "" {
			t.Errorf("%s %s: 405 without Allow", c.method, c.path)
		}
		if c.code == 401 && c.method == "GET" && w.Body.Len() != 343 {
			t.Errorf("%s %s: 401 with %d bytes, EC2's has 343", c.method, c.path, w.Body.Len())
		}
	}
	t.Logf("%d cases", len(cases))
	if len(cases) < 80 {
		t.Errorf("%d cases are fewer than the 80 that are promised", len(cases))
	}

	w := ask(h, req, "PUT", tokenPath, ttlHeader+": 300")
	if w.Header().Get(ttlHeader) != "300" || w.Header().Get("Content-Type") != "text/plain" || len(w.Body.String()) != 56 || w.Header().Get("Connection") != "close" {
		t.Errorf("PUT token answered %q with %v", w.Body, w.Header())
	}
	if allow := ask(h, req, "OPTIONS", tokenPath).Header().Get("Allow"); allow != "OPTIONS, PUT" {
		t.Errorf("OPTIONS token allows %q", allow)
	}
}

func TestTokenExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandler(t, Options{}, small("i-1", fullAddr))
		tok := ask(h, fullAddr, "PUT", tokenPath, ttlHeader+": 60").Body.String()
		time.Sleep(59 * time.Second)
		if code := ask(h, fullAddr, "GET", instanceID, tokHeader+": "+tok).Code; code != 200 {
			t.Errorf("a token of 60 s after 59 s: %d", code)
		}
		time.Sleep(time.Second)
		if code := ask(h, fullAddr, "GET", instanceID, tokHeader+": "+tok).Code; code != 401 {
			t.Errorf("a token of 60 s after 60 s: %d", code)
		}
	})
}

// TestTokenReplay uses 10,000 instances' tokens for other instances, and one
// instance's after everything that must end a token's life.
func TestTokenReplay(t *testing.T) {
	const n = 10_000
	instances := make([]*Instance, n)
	addr := func(i int) string { return netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}).String() }
	for i := range instances {
		instances[i] = small(fmt.Sprintf("i-%d", i), addr(i))
	}
	h := newHandler(t, Options{}, instances...)
	tokens := make([]string, n)
	for i := range tokens {
		tokens[i] = token(t, h, addr(i))
	}
	if c := slices.Compact(slices.Sorted(slices.Values(tokens))); len(c) != n {
		t.Errorf("%d of %d tokens are distinct", len(c), n)
	}
	for i := range tokens {
		other := (i + 1 + rand.IntN(n-1)) % n
		if code := ask(h, addr(other), "GET", instanceID, tokHeader+": "+tokens[i]).Code; code != 401 {
			t.Fatalf("instance %d's token for instance %d: %d", i, other, code)
		}
		if code := ask(h, addr(i), "GET", instanceID, tokHeader+": "+tokens[i]).Code; code != 200 {
			t.Fatalf("instance %d's own token: %d", i, code)
		}
	}

	tok := tokens[0]
	use := func(h *Handler) int { return ask(h, addr(0), "GET", instanceID, tokHeader+": "+tok).Code }
	if code := use(newHandler(t, Options{}, small("i-0", addr(0)))); code != 401 {
		t.Errorf("after a restart with new keys: %d", code)
	}
	if code := use(newHandler(t, Options{State: h.state}, small("i-new", addr(0)))); code != 401 {
		t.Errorf("after another instance got the address: %d", code)
	}
	again := small("i-0", addr(0))
	again.LaunchTime = time.Now()
	if code := use(newHandler(t, Options{State: h.state}, again)); code != 401 {
		t.Errorf("after the instance was launched anew: %d", code)
	}
	if code := use(newHandler(t, Options{State: h.state}, small("i-0", addr(0)))); code != 200 {
		t.Errorf("with the same record and keys: %d", code)
	}
	if err := h.state.Update(context.Background(), "i-0", func(l *Live) error { l.Generation++; return nil }); err != nil {
		t.Fatal(err)
	}
	if code := use(h); code != 401 {
		t.Errorf("after tokens were revoked: %d", code)
	}
	if code := ask(h, addr(1), "GET", instanceID, tokHeader+": "+tokens[1]).Code; code != 200 {
		t.Errorf("another instance's token after that: %d", code)
	}
}

// TestTokenBytes tries every value of every byte of a token.
func TestTokenBytes(t *testing.T) {
	in := small("i-1", fullAddr)
	var m minter
	k := NewTokenKey(7)
	now := time.Now()
	tok, err := base64.RawURLEncoding.DecodeString(m.mint(k, in, 0, now, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for i := range tok {
		for d := 1; d < 256; d++ {
			bad := slices.Clone(tok)
			bad[i] ^= byte(d)
			if m.valid([]TokenKey{k}, base64.RawURLEncoding.EncodeToString(bad), in, 0, now) {
				t.Fatalf("byte %d changed by %#x: still valid", i, d)
			}
		}
	}
}

func FuzzToken(f *testing.F) {
	in := small("i-1", fullAddr)
	var m minter
	k := NewTokenKey(0)
	f.Add("")
	f.Add(m.mint(NewTokenKey(0), in, 0, time.Now(), time.Hour))
	f.Add(strings.Repeat("A", 56))
	f.Fuzz(func(t *testing.T, tok string) {
		if m.valid([]TokenKey{k}, tok, in, 0, time.Now()) {
			t.Errorf("%q is valid", tok)
		}
	})
}

// FuzzRequest throws paths and headers at a handler; nothing but 200 and
// refusals may come back, and never another instance's id.
func FuzzRequest(f *testing.F) {
	h := newHandler(f, Options{}, full(f), small("i-other", "192.0.2.99"))
	f.Add("GET", "/latest/meta-data/instance-id", tokHeader, "x", "169.254.169.254")
	f.Add("GET", "//latest/meta-data/../", "X-Forwarded-For", "192.0.2.99", "instance-data.")
	f.Add("PUT", "/latest/api/token", ttlHeader, "1", "[fd00:ec2::254]:80")
	f.Fuzz(func(t *testing.T, method, path, name, value, host string) {
		if !validToken(method) || !validToken(name) {
			return
		}
		r, err := http.NewRequest(method, "http://x/", nil)
		if err != nil {
			return
		}
		r.URL.Path, r.Host, r.RemoteAddr = path, host, "192.0.2.99:1"
		r.Header.Set(name, value)
		w := &sink{header: make(http.Header)}
		h.ServeHTTP(w, r)
		if w.status != 200 && (w.status < 400 || w.status > 499) {
			t.Errorf("%s %q: %d", method, path, w.status)
		}
		if strings.Contains(string(w.body), "0abc1234def567890") {
			t.Errorf("%s %q gave another instance's id", method, path)
		}
	})
}

func validToken(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-") == ""
}

type sink struct {
	header http.Header
	status int
	body   []byte
}

func (s *sink) Header() http.Header         { return s.header }
func (s *sink) WriteHeader(status int)      { s.status = status }
func (s *sink) Write(b []byte) (int, error) { s.body = append(s.body, b...); return len(b), nil }

// TestTokenOnConnection uses tokens on one connection, where what was proven
// is remembered: whatever ends a token's life ends it there too.
func TestTokenOnConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m minter
		a, b := small("i-a", fullAddr), small("i-b", fullAddr)
		keys, others := []TokenKey{NewTokenKey(0)}, []TokenKey{NewTokenKey(0)}
		tok, late := m.mint(keys[0], a, 0, time.Now(), time.Minute), m.mint(keys[0], a, 0, time.Now(), time.Hour)
		c := new(connection)
		check := func(what string, want bool, keys []TokenKey, tok string, in *Instance, generation uint64) {
			t.Helper()
			for range 2 {
				if got := m.validOn(c, keys, tok, in, generation, time.Now()); got != want {
					t.Errorf("%s: valid is %v", what, got)
				}
			}
		}
		check("at first", true, keys, tok, a, 0)
		check("another instance", false, keys, tok, b, 0)
		check("again", true, keys, tok, a, 0)
		check("revoked", false, keys, tok, a, 1)
		check("other keys", false, others, tok, a, 0)
		check("one character less", false, keys, tok[1:], a, 0)
		check("empty", false, keys, "", a, 0)
		check("once more", true, keys, tok, a, 0)
		time.Sleep(time.Minute)
		check("expired", false, keys, tok, a, 0)
		check("a later one", true, keys, late, a, 0)
	})
}
