package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/test/freeport"
	"github.com/instar-image/instar/test/livelog"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// started is a server that a test runs.
type started struct {
	addr   string // of the first listener
	addrs  []net.Addr
	access *livelog.Log
	log    *livelog.Log
	stop   func() error // waits for Run and returns its error; may be repeated
	client *http.Client
}

func start(t testing.TB, o Options) *started {
	t.Helper()
	s := &started{access: new(livelog.Log), log: new(livelog.Log)}
	o.AccessLog, o.Log = s.access, zerolog.New(s.log)
	if o.Listen == nil {
		o.Listen = []Listen{{Name: "main", Address: "127.0.0.1:0"}}
	}
	if o.Metadata.Rate == 0 {
		o.Metadata.Rate = -1
	}
	ready := make(chan []net.Addr, 1)
	o.Ready = func(a []net.Addr) { ready <- a }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	s.stop = sync.OnceValue(func() error {
		cancel()
		err := <-done
		s.client.CloseIdleConnections()
		return err
	})
	select {
	case s.addrs = <-ready:
	case err := <-done:
		cancel()
		t.Fatalf("the server did not start: %v", err)
	}
	s.addr = s.addrs[0].String()
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	return s
}

func record(id, addr string) *metadata.Instance {
	return &metadata.Instance{ID: id, Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr(addr)}}}
}

func source(t testing.TB, ins ...*metadata.Instance) metadata.Source {
	t.Helper()
	set, err := metadata.NewSet(ins...)
	if err != nil {
		t.Fatal(err)
	}
	return metadata.Static(set)
}

// get makes a request; headers are "Name: value".
func (s *started) get(t testing.TB, method, path string, headers ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://"+s.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	res, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

const instanceID = "/latest/meta-data/instance-id"

func TestRun(t *testing.T) {
	in := record("i-1", "127.0.0.1")
	in.UserData = metadata.Blob("#!/bin/sh\necho the-user-data\n")
	in.Role = &metadata.Role{Name: "r", Credentials: metadata.Credentials{Static: &metadata.StaticKeys{AccessKeyID: "AKIA", SecretAccessKey: "the-secret-key", Token: "the-session-token"}}}
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, in)}, Admin: "127.0.0.1:0"})
	code, tok := s.get(t, "PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60")
	if code != 200 {
		t.Fatalf("PUT token: %d", code)
	}
	if code, body := s.get(t, "GET", instanceID, "X-aws-ec2-metadata-token: "+tok); code != 200 || body != "i-1" {
		t.Errorf("GET with a token: %d %q", code, body)
	}
	s.get(t, "GET", instanceID, "X-aws-ec2-metadata-token: a-wrong-token")
	s.get(t, "GET", "/latest/user-data")
	s.get(t, "GET", "/latest/meta-data/iam/security-credentials/r")
	s.get(t, "GET", "//latest//meta-data/?secret=in-the-query")
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	out := s.access.String()
	for _, secret := range []string{tok, "a-wrong-token", "the-user-data", "the-secret-key", "the-session-token", "in-the-query"} {
		if strings.Contains(out, secret) {
			t.Errorf("the access log holds %q", secret)
		}
	}
	var got []string
	for line := range strings.Lines(out) {
		var e struct {
			Level, Instance, From, Listener, Method, Path, Token, Note string
			Time                                                       time.Time
			Status, Bytes                                              int
			Us                                                         *int
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if !strings.HasPrefix(e.From, "127.0.0.1:") || e.Instance != "i-1" || e.Listener != "main" || e.Time.IsZero() || e.Us == nil {
			t.Errorf("the log line %s lacks something", line)
		}
		got = append(got, fmt.Sprintf("%s %s %s %d %d %s", e.Level, e.Method, e.Path, e.Status, e.Bytes, e.Token))
	}
	want := []string{
		"info PUT /latest/api/token 200 56 issued",
		"info GET /latest/meta-data/instance-id 200 3 valid",
		"warn GET /latest/meta-data/instance-id 401 343 bad",
		"info GET /latest/user-data 200 29 none",
		"info GET /latest/meta-data/iam/security-credentials/r 200 228 none",
		"info GET //latest//meta-data/ 200 177 none",
	}
	for i := range got { // sizes of listings and times are not what is pinned here
		if i >= len(want) || strings.Join(strings.Fields(got[i])[:4], " ") != strings.Join(strings.Fields(want[i])[:4], " ") {
			t.Errorf("access log: got %q, want %q", got, want)
			break
		}
	}
	if len(got) != len(want) {
		t.Errorf("access log has %d lines, want %d", len(got), len(want))
	}
}

// slowMinter mints when it is told to.
type slowMinter struct{ asked, mint chan struct{} }

func (m slowMinter) Mint(context.Context, *metadata.STS, string) (metadata.StaticKeys, error) {
	close(m.asked)
	<-m.mint
	return metadata.StaticKeys{AccessKeyID: "A", SecretAccessKey: "S", Expiration: time.Now().Add(time.Hour)}, nil
}

// TestStop lets an answer under way finish, and takes no new connections.
func TestStop(t *testing.T) {
	in := record("i-1", "127.0.0.1")
	in.Role = &metadata.Role{Name: "r", Credentials: metadata.Credentials{STS: &metadata.STS{Endpoint: "http://x", AccessKeyID: "a", SecretAccessKey: "s"}}}
	m := slowMinter{make(chan struct{}), make(chan struct{})}
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, in), Keys: metadata.NewKeyRing(m)}, Limits: Limits{Grace: time.Minute}})
	answered := make(chan int)
	go func() {
		code, _ := s.get(t, "GET", "/latest/meta-data/iam/security-credentials/r")
		answered <- code
	}()
	<-m.asked
	stopped := make(chan error, 1)
	go func() { stopped <- s.stop() }()
	for { // until the listener is closed
		d, err := net.Dial("tcp", s.addr)
		if err != nil {
			break
		}
		d.Close()
	}
	select {
	case err := <-stopped:
		t.Errorf("stopped (%v) with a request under way", err)
	default:
	}
	close(m.mint)
	if code := <-answered; code != 200 {
		t.Errorf("the request under way: %d", code)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestAdmin(t *testing.T) {
	addr := freeport.Address(freeport.Port(t))
	var reload error
	control := filepath.Join(t.TempDir(), "ctl.sock")
	s := start(t, Options{Metadata: metadata.Options{Source: source(t, record("i-1", "127.0.0.1"))}, Admin: addr, Control: control, Reload: func() error { return reload }})
	s.get(t, "GET", instanceID)
	s.get(t, "GET", "/none")
	page := func(path string) (int, string) {
		res, err := s.client.Get("http://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	_, metrics := page("/metrics")
	for _, want := range []string{
		`instar_metadata_requests_total{status="200"} 1`, `instar_metadata_requests_total{status="404"} 1`,
		"instar_metadata_instances 1", "instar_metadata_request_seconds_count 2", "instar_metadata_reload_ok 1", "go_goroutines",
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, _ := page(path); code != 200 {
			t.Errorf("%s: %d", path, code)
		}
	}
	if code, _ := page("/latest/meta-data/"); code != 404 {
		t.Errorf("metadata at the admin address: %d", code)
	}
	if code, _ := s.get(t, "GET", "/metrics"); code != 404 {
		t.Errorf("metrics for instances: %d", code)
	}
	reload = fmt.Errorf("a.yaml:3: broken")
	ctl := NewClient(control)
	if _, err := ctl.Reload(context.Background()); err == nil || !strings.Contains(err.Error(), "a.yaml:3") {
		t.Errorf("reload: %v", err)
	}
	if code, _ := page("/readyz"); code != 503 {
		t.Errorf("/readyz after a failed reload: %d", code)
	}
	if code, _ := page("/healthz"); code != 200 {
		t.Errorf("/healthz after a failed reload: %d", code)
	}
	if st, err := ctl.Status(context.Background()); err != nil || !strings.Contains(st.ReloadFail, "a.yaml:3") {
		t.Errorf("status: %+v, %v", st, err)
	}
	reload = nil
	if st, err := ctl.Reload(context.Background()); err != nil || st.ReloadFail != "" {
		t.Errorf("reload: %+v, %v", st, err)
	}
	if code, _ := page("/readyz"); code != 200 {
		t.Errorf("/readyz after a good reload: %d", code)
	}
}

// TestControl sets events live, revokes tokens, and finds all of it again
// after a restart.
func TestControl(t *testing.T) {
	dir := t.TempDir()
	run := func() (*started, *Client) {
		st, err := OpenState(dir)
		if err != nil {
			t.Fatal(err)
		}
		control := filepath.Join(dir, "run", "ctl.sock")
		launched := record("i-2", "127.0.0.2")
		launched.Launch = &metadata.Launch{Format: "ec2", Store: "s3://b", Manifest: "m", Certificate: "x"}
		s := start(t, Options{Metadata: metadata.Options{Source: source(t, record("i-1", "127.0.0.1"), launched), State: st}, Control: control})
		if fi, err := os.Stat(control); err != nil || fi.Mode().Perm() != 0o660 {
			t.Errorf("the control socket: %v, %v", fi, err)
		}
		return s, NewClient(control)
	}
	ctx := context.Background()
	s, ctl := run()
	list, err := ctl.List(ctx)
	if err != nil || len(list) != 2 || list[0].ID != "i-1" || list[1].Addresses[0].String() != "127.0.0.2" {
		t.Fatalf("list: %+v, %v", list, err)
	}
	const action = "/latest/meta-data/spot/instance-action"
	if code, _ := s.get(t, "GET", action); code != 404 {
		t.Errorf("before the event: %d", code)
	}
	at := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	change := EventChange{Set: metadata.Events{SpotAction: &metadata.SpotAction{Action: "stop", Time: at}, Lifecycle: "Standby"}}
	if _, err := ctl.SetEvents(ctx, "i-1", change); err != nil {
		t.Fatal(err)
	}
	const notice = `{"action":"stop","time":"2026-05-06T07:08:09Z"}`
	if code, body := s.get(t, "GET", action); code != 200 || body != notice {
		t.Errorf("after the event: %d %s", code, body)
	}
	if _, err := ctl.SetEvents(ctx, "i-1", EventChange{Clear: []string{"lifecycle"}}); err != nil {
		t.Fatal(err)
	}
	if code, _ := s.get(t, "GET", "/latest/meta-data/autoscaling/target-lifecycle-state"); code != 404 {
		t.Errorf("after it was cleared: %d", code)
	}
	for _, bad := range []EventChange{{Clear: []string{"all", "x"}}, {Set: metadata.Events{Lifecycle: "x"}}, {Set: metadata.Events{SpotAction: &metadata.SpotAction{}}}} {
		if _, err := ctl.SetEvents(ctx, "i-1", bad); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
	if _, err := ctl.Show(ctx, "i-9"); err == nil || !strings.Contains(err.Error(), `"i-9"`) {
		t.Errorf("an instance that is not there: %v", err)
	}
	_, tok := s.get(t, "PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60")
	if _, err := ctl.Revoke(ctx, "i-1"); err != nil {
		t.Fatal(err)
	}
	if code, _ := s.get(t, "GET", instanceID, "X-aws-ec2-metadata-token: "+tok); code != 401 {
		t.Errorf("a revoked token: %d", code)
	}
	if _, err := ctl.WithdrawTicket(ctx, "i-1"); err == nil || !strings.Contains(err.Error(), "no launch") {
		t.Errorf("withdrawing what is not there: %v", err)
	}
	if list[1].Ticket != "unclaimed" || list[0].Ticket != "" {
		t.Errorf("tickets: %+v", list)
	}
	if d, err := ctl.WithdrawTicket(ctx, "i-2"); err != nil || d.Ticket != "completed" {
		t.Errorf("withdrawing: %+v, %v", d, err)
	}
	if d, err := ctl.RenewTicket(ctx, "i-2"); err != nil || d.Ticket != "unclaimed" {
		t.Errorf("renewing: %+v, %v", d, err)
	}
	if _, err := ctl.Reload(ctx); err == nil {
		t.Error("a source that cannot be reloaded was")
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := ctl.Status(ctx); err == nil || !strings.Contains(err.Error(), "is it running") {
		t.Errorf("the client without a server: %v", err)
	}

	s, ctl = run()
	if _, body := s.get(t, "GET", action); body != notice {
		t.Errorf("after a restart: %s", body)
	}
	if d, err := ctl.Show(ctx, "i-1"); err != nil || d.Live.Generation != 1 || d.Current.SpotAction == nil || d.Current.Lifecycle != "" {
		t.Errorf("after a restart: %+v, %v", d, err)
	}
	if _, err := listenControl(ctx, filepath.Join(dir, "run", "ctl.sock")); err == nil || !strings.Contains(err.Error(), "somebody serves at") {
		t.Errorf("a second server on the control socket: %v", err)
	}
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenControl(ctx, precious); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a control socket in the place of a file: %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("the file: %v", err)
	}
}

func TestOpenSigner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if _, err := OpenSigner(dir); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, "identity-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "identity-key.pem")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode: %v, %v", fi, err)
	}
	// A crash between the two files: the key stays, the certificate is made.
	if err := os.Remove(filepath.Join(dir, "identity-cert.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSigner(dir); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(filepath.Join(dir, "identity-key.pem")); err != nil || !bytes.Equal(key, again) {
		t.Errorf("the key changed: %v", err)
	}
	other := t.TempDir()
	if _, err := OpenSigner(other); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(other, "identity-cert.pem"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "identity-cert.pem"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSigner(dir); err == nil || !strings.Contains(err.Error(), "not the identity key's") {
		t.Errorf("another key's certificate: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "identity-key.pem"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSigner(dir); err == nil {
		t.Error("a key file with nonsense was taken")
	}
}

func TestParseListen(t *testing.T) {
	for s, want := range map[string]Listen{
		"169.254.169.254":              {"169.254.169.254:80", "169.254.169.254:80", ""},
		"169.254.169.254:8080":         {"169.254.169.254:8080", "169.254.169.254:8080", ""},
		"[fd00:ec2::254]":              {"[fd00:ec2::254]:80", "[fd00:ec2::254]:80", ""},
		"fd00:ec2::254":                {"[fd00:ec2::254]:80", "[fd00:ec2::254]:80", ""},
		"[fd00:ec2::254]:81":           {"[fd00:ec2::254]:81", "[fd00:ec2::254]:81", ""},
		"169.254.169.254@tap0":         {"tap0", "169.254.169.254:80", "tap0"},
		"vm-1=169.254.169.254:80@tap0": {"vm-1", "169.254.169.254:80", "tap0"},
	} {
		if got, err := ParseListen(s); err != nil || got != want {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "=1.2.3.4", "1.2.3.4@", "1.2.3.4:0x50", "1.2.3.4:99999", "1.2.3.4@" + strings.Repeat("x", 16), "localhost:80"} {
		if l, err := ParseListen(s); err == nil {
			t.Errorf("%q: %+v", s, l)
		}
	}
}

func TestListenErrors(t *testing.T) {
	for addr, want := range map[string]string{"192.0.2.77:80": "no interface has the address", "127.0.0.1:0@none0": "there is no interface none0"} {
		l, err := ParseListen(addr)
		if err != nil {
			t.Fatal(err)
		}
		err = Run(context.Background(), Options{Metadata: metadata.Options{Source: source(t, record("i-1", "127.0.0.1"))}, Listen: []Listen{l}, Log: zerolog.Nop()})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if err := Run(context.Background(), Options{Metadata: metadata.Options{Source: source(t)}}); err == nil || !strings.Contains(err.Error(), "no place to listen") {
		t.Errorf("no listener: %v", err)
	}
	if err := Run(context.Background(), Options{}); err == nil {
		t.Error("no source: no error")
	}
}

// TestWatchFails checks that a failing part ends the whole with its error.
func TestWatchFails(t *testing.T) {
	err := Run(context.Background(), Options{
		Metadata: metadata.Options{Source: source(t, record("i-1", "127.0.0.1"))}, Log: zerolog.Nop(), Listen: []Listen{{Address: "127.0.0.1:0"}},
		Watch: func(context.Context, func(error)) error { return fmt.Errorf("the watch broke") },
	})
	if err == nil || !strings.Contains(err.Error(), "the watch broke") {
		t.Errorf("got %v", err)
	}
}

func TestGate(t *testing.T) {
	g := &gate{total: 5, each: 2, strangers: 1}
	got := []bool{g.enter("a"), g.enter("a"), g.enter("a"), g.enter(""), g.enter(""), g.enter("b"), g.enter("b"), g.enter("c")}
	if want := []bool{true, true, false, true, false, true, true, false}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	g.crowd.Leave("a")
	if !g.enter("c") {
		t.Error("a place that was left is not free")
	}
}
