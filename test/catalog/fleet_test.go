package catalog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload/catalog"
)

// ground is what all histories of a test share: a store, keys, and as many access
// keys as a history has steps, so that the catalog's own record of who did what
// tells steps apart.
type ground struct {
	*instar.Instar
	store *servers.Server
	folder
	bucket string
}

func newGround(t *testing.T, store *servers.Server, steps int) *ground {
	t.Helper()
	g := &ground{store: store, folder: folder{t.TempDir()}, bucket: store.Bucket(t)}
	g.Instar = instar.New(t, store.Env()...)
	loopfs.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", g.path("key"))
	pub, err := os.ReadFile(g.path("key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "accounts:\n  - id: %q\n    keys: [{access-key-id: %s, secret-access-key: %s}]\n  - id: %q\n    keys:\n", bob, "AKBOB", secretOf("AKBOB"), alice)
	for i := range steps {
		fmt.Fprintf(&b, "      - {access-key-id: %s, secret-access-key: %s}\n", keyOf(i), secretOf(keyOf(i)))
	}
	for name, text := range map[string]string{"signers": `* namespaces="instar-catalog" ` + string(pub), "accounts.yaml": b.String()} {
		g.write(t, name, text)
	}
	return g
}

func keyOf(step int) string { return fmt.Sprintf("AKSTEP%04d", step) }

func secretOf(key string) string { return "secret-of-" + key }

// open opens the catalog of a history, as one more writer, without faults.
func (g *ground) open(t *testing.T, prefix string) *catalog.Catalog {
	t.Helper()
	return openCatalog(t, g.store, "s3://"+g.bucket+"/"+prefix, g.folder, nil)
}

// fleet is some servers over one catalog, each behind a wire of its own, each on
// a machine of its own as far as it remembers anything.
type fleet struct {
	*ground
	replicas []*replica
	over     chan struct{} // nothing is begun again
	wg       sync.WaitGroup
}

// replica is a server that is begun again whenever it dies.
type replica struct {
	fleet *fleet
	wire  *wire
	name  string
	index int

	mu         sync.Mutex
	url        string // "" while it does not serve
	process    *os.Process
	generation int
	marks      []int // of each generation that died, on the wire
	log        bytes.Buffer
}

func newFleet(t *testing.T, g *ground, prefix string, n int, seed uint64, since func() int64) *fleet {
	t.Helper()
	f := &fleet{ground: g, over: make(chan struct{})}
	for i := range n {
		r := &replica{fleet: f, index: i, name: fmt.Sprintf("%s-%d", prefix, i), wire: newWire(t, g.store.Endpoint, seed<<8|uint64(i), since)}
		r.wire.kill = r.kill
		f.replicas = append(f.replicas, r)
		f.wg.Go(func() { r.live(t, prefix) })
	}
	t.Cleanup(func() { f.end(t) })
	return f
}

// end kills all servers and waits until nothing of them is under way.
func (f *fleet) end(t *testing.T) {
	t.Helper()
	select {
	case <-f.over:
		return
	default:
		close(f.over)
	}
	for _, r := range f.replicas {
		r.kill()
	}
	f.wg.Wait()
	for _, r := range f.replicas {
		if err := r.wire.quiet(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("the wire of %s: %v", r.name, err)
		}
	}
}

// live begins the server, and begins it again, until the end.
func (r *replica) live(t *testing.T, prefix string) {
	for failed := 0; ; {
		select {
		case <-r.fleet.over:
			return
		default:
		}
		served, err := r.run(t, prefix)
		if err != nil {
			t.Errorf("server %s: %v", r.name, err)
			return
		}
		if failed++; served {
			failed = 0
		}
		if failed == 50 {
			t.Errorf("server %s does not begin:\n%s", r.name, tail(r.text()))
			return
		}
	}
}

// run runs the server until it dies.
func (r *replica) run(t *testing.T, prefix string) (served bool, err error) {
	g := r.fleet.ground
	// An address nobody else ever has: who asks for a server that has died must
	// not reach the next one.
	listen := fmt.Sprintf("127.%d.%d.%d:0", 20+r.index, r.generation>>8, r.generation&255)
	cmd := exec.Command(g.Program, "catalog", "serve", "--store", "s3://"+g.bucket+"/"+prefix, "--sign", g.path("key"), "--signers", g.path("signers"),
		"--accounts", g.path("accounts.yaml"), "--listen", listen, "--access-log", "none", "--no-web")
	cmd.Env = append(g.Environ(), "AWS_ENDPOINT_URL="+r.wire.url, "INSTAR_STATE="+g.path("state-"+r.name))
	cmd.Dir = g.Home
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	if err := cmd.Start(); err != nil {
		r.mu.Unlock()
		return false, err
	}
	r.process = cmd.Process
	r.mu.Unlock()
	select {
	case <-r.fleet.over: // it began while the end did
		r.kill()
	default:
	}
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		var l struct{ Message, Address string }
		r.mu.Lock()
		if json.Unmarshal(lines.Bytes(), &l) == nil && l.Message == "serving the catalog" {
			r.url, served = "http://"+l.Address, true
		}
		r.log.Write(append(lines.Bytes(), '\n'))
		r.mu.Unlock()
	}
	_ = cmd.Wait() // killed, or its beginning failed at a fault
	mark, err := r.wire.mark(context.WithoutCancel(t.Context()))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.url, r.process = "", nil
	r.generation++
	r.marks = append(r.marks, mark)
	return served, err
}

// kill kills the server, if it runs.
func (r *replica) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.url = ""
	if r.process != nil {
		_ = r.process.Kill() // which says that it has died already, if it has
	}
}

func (r *replica) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

// at is where a server can be reached now, one of those that can.
func (f *fleet) at(ctx context.Context, rnd *rand.Rand) (r *replica, url string, generation int, err error) {
	for {
		for _, i := range rnd.Perm(len(f.replicas)) {
			r := f.replicas[i]
			r.mu.Lock()
			url, generation := r.url, r.generation
			r.mu.Unlock()
			if url != "" {
				return r, url, generation, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, "", 0, context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
