package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/task"
)

// askEnv makes the test binary a client: "SOCKET METHOD PATH [BODY]"; it prints
// the answer's status and body.
const askEnv = "INSTAR_SERVER_TEST_ASK"

func TestMain(m *testing.M) {
	if ask := os.Getenv(askEnv); ask != "" {
		f := strings.SplitN(ask, " ", 4)
		f = append(f, "")
		status, body, err := raw(f[0], f[1], f[2], f[3])
		if err != nil {
			fmt.Println(err)
			os.Exit(0)
		}
		fmt.Println(status, body)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// raw makes a request without the client's help.
func raw(socket, method, path, body string) (int, string, error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	q, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	res, err := c.Do(q)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	var b bytes.Buffer
	_, err = b.ReadFrom(res.Body)
	return res.StatusCode, b.String(), err
}

// still is a launcher whose workers begin, and do nothing until they are told.
type still struct {
	dir    task.Dir
	frozen bool
	out    *task.Output
	lock   *os.File
}

func (l *still) Launch(_ context.Context, j task.Job) (err error) {
	if l.lock, err = l.dir.Lock(j.ID); err != nil {
		return err
	}
	l.out, err = l.dir.Output(j.ID, nil)
	return err
}

func (l *still) Stop(context.Context, string) error   { return l.lock.Close() }
func (l *still) Freeze(context.Context, string) error { l.frozen = true; return nil }
func (l *still) Thaw(context.Context, string) error   { l.frozen = false; return nil }

// serve runs a server in a directory that everybody can reach.
func serve(t *testing.T, o server.Options) (socket string, l *still) {
	t.Helper()
	top, err := os.MkdirTemp("/tmp", "instar-server-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := task.OpenDir(filepath.Join(top, "tasks"))
	if err != nil {
		t.Fatal(err)
	}
	l = &still{dir: dir}
	m, _, err := task.Open(task.Options{Dir: dir, Launcher: l, Poll: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(top, "agent.sock")
	lns, err := server.Listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o.Manager, o.Log, o.Version = m, zerolog.Nop(), "test"
	done := make(chan error, 2)
	go func() { done <- m.Run(ctx) }()
	go func() { done <- server.New(o).Serve(ctx, lns...) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return socket, l
}

func TestAPI(t *testing.T) {
	socket, l := serve(t, server.Options{})
	c := server.NewClient(socket)
	ctx := t.Context()
	if err := c.Alive(ctx); err != nil {
		t.Fatal(err)
	}
	r := task.Request{Kind: task.CreateImage, Name: "web", ClientToken: "t"}
	started, err := c.Start(ctx, r)
	if err != nil || started.State != task.Pending || started.By.PID != int32(os.Getpid()) || started.By.UID != 0 {
		t.Fatalf("%+v, %v", started, err)
	}
	if again, err := c.Start(ctx, r); err != nil || again.ID != started.ID {
		t.Errorf("the same request again: %v, %v", again.ID, err)
	}
	var seen []string
	tell := make(chan error, 1)
	followed, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		_, err := c.Follow(followed, started.ID, func(t task.Task) {
			if s := string(t.State); len(seen) == 0 || seen[len(seen)-1] != s {
				seen = append(seen, s)
			}
		})
		tell <- err
	}()
	for {
		tk, err := c.Show(ctx, started.ID)
		if err != nil {
			t.Fatal(err)
		}
		if pid, err := l.dir.Worker(started.ID); err == nil && pid > 0 && tk.State == task.Bundling {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if p, err := c.Pause(ctx, started.ID); err != nil || !p.Paused || !l.frozen {
		t.Errorf("pause: %+v, %v", p, err)
	}
	if p, err := c.Resume(ctx, started.ID); err != nil || p.Paused || l.frozen {
		t.Errorf("resume: %+v, %v", p, err)
	}
	if all, err := c.List(ctx, task.Bundling); err != nil || len(all) != 1 {
		t.Errorf("list: %v, %v", all, err)
	}
	if all, err := c.List(ctx, task.Complete); err != nil || len(all) != 0 {
		t.Errorf("list of others: %v, %v", all, err)
	}
	if s, err := c.Status(ctx); err != nil || s.Tasks[task.Bundling] != 1 || s.Version != "test" {
		t.Errorf("status: %+v, %v", s, err)
	}
	if x, err := c.Cancel(ctx, started.ID); err != nil || x.State != task.Cancelling {
		t.Errorf("cancel: %+v, %v", x, err)
	}
	if err := <-tell; err != nil {
		t.Error(err)
	}
	if len(seen) == 0 || seen[len(seen)-1] != string(task.Cancelled) {
		t.Errorf("followed %v", seen)
	}

	// What goes wrong has EC2's codes.
	for _, x := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "/v1/tasks/bun-00000000000000000", "", 404, "InvalidBundleId.NotFound"},
		{"GET", "/v1/tasks/..%2f..%2fetc", "", 404, "InvalidBundleId.NotFound"},
		{"GET", "/v1/tasks?state=dancing", "", 400, "InvalidParameterValue"},
		{"POST", "/v1/tasks", "{", 400, "InvalidParameterValue"},
		{"POST", "/v1/tasks", `{"kind":"create-image","name":"x","unknown":1}`, 400, "InvalidParameterValue"},
		{"POST", "/v1/tasks", strings.Repeat(" ", 300<<10), 400, "InvalidParameterValue"},
		{"POST", "/v1/tasks", `{"kind":"create-image","name":"other","client-token":"t"}`, 409, "IdempotentParameterMismatch"},
		{"POST", "/v1/tasks/" + started.ID + "/pause", "", 409, "IncorrectState"},
		{"DELETE", "/v1/tasks/" + started.ID, "", 404, "InvalidAction"},
		{"GET", "/", "", 404, "InvalidAction"},
	} {
		status, body, err := raw(socket, x.method, x.path, x.body)
		if err != nil || status != x.status || !strings.Contains(body, `"code":"`+x.code+`"`) {
			t.Errorf("%s %s: %d %s, %v; want %d %s", x.method, x.path, status, body, err, x.status, x.code)
		}
	}
}

// as asks as another user.
func as(t *testing.T, uid, gid uint32, groups []uint32, ask string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary may be where nobody else can reach it.
	program := filepath.Join(filepath.Dir(strings.Fields(ask)[0]), "client")
	if _, err := os.Stat(program); err != nil {
		data, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, data, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(program, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program)
	cmd.Dir = "/"
	cmd.Env = []string{askEnv + "=" + ask}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s as %d: %v: %s", ask, uid, err, out)
	}
	return string(out)
}

// TestPeers: the kernel's word decides, not the request's.
func TestPeers(t *testing.T) {
	const admins, viewers, others = 60001, 60002, 60003
	socket, _ := serve(t, server.Options{Policy: server.Policy{AdminGroup: fmt.Sprint(admins), ViewGroup: fmt.Sprint(viewers)}})
	start := socket + ` POST /v1/tasks {"kind":"create-image","name":"x"}`
	look := socket + " GET /v1/tasks"
	many := make([]uint32, 300) // more groups than a small buffer holds
	for i := range many {
		many[i] = 70000 + uint32(i)
	}
	for _, c := range []struct {
		who      string
		gid      uint32
		groups   []uint32
		ask      string
		want     string
		contains string
	}{
		{"an admin by primary group", admins, nil, start, "201", "pending"},
		{"an admin by another group", others, append(slices.Clone(many), admins), start, "201", "pending"},
		{"an admin", admins, nil, look, "200", "tasks"},
		{"a viewer", others, []uint32{viewers}, look, "200", "tasks"},
		{"a viewer", viewers, nil, socket + " GET /metrics", "200", ""},
		{"a viewer", viewers, nil, start, "403", "viewer here"},
		{"a viewer", viewers, nil, socket + " POST /v1/tasks/bun-00000000000000000/cancel", "403", "UnauthorizedOperation"},
		{"somebody", others, many, look, "403", "nobody here"},
		{"somebody", others, nil, socket + " GET /metrics", "403", ""},
		{"somebody", others, nil, start, "403", ""},
		{"somebody", others, nil, socket + " GET /healthz", "200", "ok"},
	} {
		got := as(t, 60000, c.gid, c.groups, c.ask)
		if !strings.HasPrefix(got, c.want+" ") || !strings.Contains(got, c.contains) {
			t.Errorf("%s, %s: %s; want %s", c.who, c.ask[len(socket)+1:], got, c.want)
		}
	}
	// Without groups only root is anybody.
	plain, _ := serve(t, server.Options{Policy: server.Policy{AdminGroup: "no-such-group"}})
	if got := as(t, 60000, 0, nil, plain+" GET /v1/tasks"); !strings.HasPrefix(got, "403 ") {
		t.Errorf("a stranger in root's group: %s", got)
	}
	if status, _, err := raw(plain, "GET", "/v1/tasks", ""); err != nil || status != 200 {
		t.Errorf("root: %d, %v", status, err)
	}
}

// TestConnections: one user's connections do not keep others out.
func TestConnections(t *testing.T) {
	socket, _ := serve(t, server.Options{})
	// The client is made now: those that ask nothing are closed after a while.
	if got := as(t, 60000, 60000, nil, socket+" GET /healthz"); !strings.HasPrefix(got, "200") {
		t.Errorf("before: %s", got)
	}
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for range 300 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	if err := server.NewClient(socket).Alive(t.Context()); err != nil {
		t.Errorf("root is kept out: %v", err)
	}
	if got := as(t, 60000, 60000, nil, socket+" GET /healthz"); strings.HasPrefix(got, "200") {
		t.Errorf("no limit of connections: %s", got)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	lns, err := server.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "somebody serves at") {
		t.Errorf("a second agent: %v", err)
	}
	lns[0].(*net.UnixListener).SetUnlinkOnClose(false) // as by a kill
	lns[0].Close()
	if lns, err = server.Listen(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	lns[0].Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("in the place of a file: %v", err)
	}
	if _, err := server.NewClient(filepath.Join(dir, "none")).Status(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no agent: %v", err)
	}
}

// TestDocument: the document that is served is the one in docs, and says what
// the server does.
func TestDocument(t *testing.T) {
	socket, _ := serve(t, server.Options{})
	want, err := json.MarshalIndent(server.Document(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	const file = "../../docs/agent-openapi.json"
	if os.Getenv("INSTAR_UPDATE") != "" {
		if err := os.WriteFile(file, append(want, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil || string(got) != string(want)+"\n" {
		t.Errorf("docs/agent-openapi.json is not current (%v): INSTAR_UPDATE=1 go test ./agent/server -run TestDocument", err)
	}
	status, body, err := raw(socket, "GET", "/v1/openapi.json", "")
	if err != nil || status != 200 {
		t.Fatal(status, err)
	}
	var doc struct {
		Paths map[string]map[string]struct {
			OperationID string                     `json:"operationId"`
			Responses   map[string]json.RawMessage `json:"responses"`
		} `json:"paths"`
		Components struct {
			Schemas map[string]struct {
				Properties map[string]json.RawMessage `json:"properties"`
				Required   []string                   `json:"required"`
			} `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal([]byte(body), &doc); err != nil {
		t.Fatal(err)
	}
	started, err := server.NewClient(socket).Start(t.Context(), task.Request{Kind: task.CreateImage, Name: "x"})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for path, methods := range doc.Paths {
		for method, op := range methods {
			n++
			if strings.HasSuffix(path, "/progress") { // it would wait for the end
				continue
			}
			at := strings.ReplaceAll(path, "{id}", started.ID)
			status, body, err := raw(socket, strings.ToUpper(method), at, "")
			if err != nil || strings.Contains(body, "InvalidAction") {
				t.Errorf("%s: %s, %v", op.OperationID, body, err)
			}
			if _, ok := op.Responses[fmt.Sprint(status)]; !ok {
				t.Errorf("%s answered %d, of which the document says nothing", op.OperationID, status)
			}
		}
	}
	if n < 11 {
		t.Errorf("only %d operations", n)
	}
	// An answer's members are those of its schema.
	_, body, err = raw(socket, "GET", "/v1/tasks/"+started.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal([]byte(body), &members); err != nil {
		t.Fatal(err)
	}
	schema := doc.Components.Schemas["Task"]
	for m := range members {
		if _, ok := schema.Properties[m]; !ok {
			t.Errorf("a task has %q, which the document does not know", m)
		}
	}
	for _, r := range schema.Required {
		if _, ok := members[r]; !ok {
			t.Errorf("a task lacks %q", r)
		}
	}
}
