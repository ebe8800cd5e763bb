package imds

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/storesource"
	"github.com/instar-image/instar/test/freeport"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
)

// fleetStore is where a fleet's records and state are.
type fleetStore struct {
	name, url string
	env       []string
	server    *servers.Server
}

// fleetStores are a directory, MinIO and versitygw.
func fleetStores(t *testing.T) []fleetStore {
	t.Helper()
	all := []fleetStore{{name: "directory", url: "file://" + filepath.Join(t.TempDir(), "fleet")}}
	for _, s := range []*servers.Server{servers.MinIO(t), servers.Versity(t)} {
		all = append(all, fleetStore{s.Name, "s3://" + s.Bucket(t) + "/fleet", s.Env(), s})
	}
	return all
}

// counting counts how often objects are read.
type counting struct {
	upload.Store
	gets atomic.Int64
}

func (c *counting) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	c.gets.Add(1)
	return c.Store.Get(ctx, key, o)
}

// TestFleetState has four servers' states and sources on each real store:
// changes at once from all of them are all kept, and what did not change is
// not read again.
func TestFleetState(t *testing.T) {
	const instances, changes = 10, 5
	ctx := t.Context()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fleetStores(t)[1:] {
		open := func() *counting {
			s, err := upload.Open(ctx, f.url, upload.Options{
				Endpoint: f.server.Endpoint, Region: f.server.Region,
				Credentials: &upload.Credentials{AccessKeyID: f.server.AccessKey, SecretAccessKey: f.server.SecretKey},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			return &counting{Store: s}
		}
		put := func(s upload.Store, n int, more string) {
			t.Helper()
			object, err := storesource.Seal(fmt.Appendf(nil, "instance-id: i-%d\ncaller: {addresses: [10.0.0.%d]}\n%s", n, n, more), signer, id.Recipient())
			if err == nil {
				_, err = upload.PutBytes(ctx, s, fmt.Sprintf("%si-%d", storesource.Prefix, n), object, upload.PutOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		stores := make([]*counting, 4)
		states := make([]*storesource.State, 4)
		var wg sync.WaitGroup
		for i := range states {
			stores[i] = open()
		}
		for i := range states { // at once: one makes the token key
			wg.Go(func() {
				var err error
				if states[i], err = storesource.OpenState(ctx, stores[i], []age.Identity{id}, []age.Recipient{id.Recipient()}); err != nil {
					t.Errorf("%s: %v", f.name, err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		for _, s := range states {
			for n := range instances {
				wg.Go(func() {
					for range changes {
						if err := s.Update(ctx, fmt.Sprintf("i-%d", n), func(l *metadata.Live) error { l.Generation++; return nil }); err != nil {
							t.Errorf("%s: %v", f.name, err)
						}
					}
				})
			}
		}
		wg.Wait()
		for i, s := range states {
			if err := s.Refresh(ctx); err != nil {
				t.Errorf("%s: %v", f.name, err)
			}
			if s.TokenKeys()[0] != states[0].TokenKeys()[0] {
				t.Errorf("%s: two servers have different token keys", f.name)
			}
			for n := range instances {
				if g := s.Live(fmt.Sprintf("i-%d", n)).Generation; g != 4*changes {
					t.Errorf("%s: server %d has generation %d of i-%d after %d changes", f.name, i, g, n, 4*changes)
				}
			}
			before := stores[i].gets.Load()
			if err := s.Refresh(ctx); err != nil || stores[i].gets.Load() != before {
				t.Errorf("%s: what did not change was read again: %d times, %v", f.name, stores[i].gets.Load()-before, err)
			}
		}

		for n := range instances {
			put(stores[0], n, "")
		}
		src, err := storesource.Open(ctx, storesource.Options{Store: stores[1], Identities: []age.Identity{id}, Signers: []storesource.Signer{{Principals: []string{"i-*"}, Key: signer.PublicKey()}}})
		if err != nil || src.Instances().Len() != instances {
			t.Fatalf("%s: %v", f.name, err)
		}
		put(stores[0], 3, "user-data: new\n")
		before := stores[1].gets.Load()
		if err := src.Reload(ctx); err != nil || stores[1].gets.Load() != before+1 || string(src.Instances().Get("i-3").UserData) != "new" {
			t.Errorf("%s: one record changed, %d were read, %v", f.name, stores[1].gets.Load()-before, err)
		}
	}
}

// TestFleet has two servers of each store at work: records sealed by the
// command, one token key; events, revocations and withdrawals at one of them
// hold at the other, also when both are changed at once.
func TestFleet(t *testing.T) {
	dir := t.TempDir()
	sh(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "key"))
	pub, err := os.ReadFile(filepath.Join(dir, "key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	signers, identity := writeFile(t, "signers", append([]byte("i-* "), pub...)), writeFile(t, "identity", []byte(id.String()+"\n"))
	record := writeFile(t, "a.yaml", []byte("instance-id: i-1\ncaller: {addresses: [127.0.0.1]}\nuser-data: sealed\nlaunch: {format: ec2, store: 's3://b', manifest: m, certificate: x}\n"))
	here := netns{}
	for _, f := range fleetStores(t) {
		seal := here.command(t.Context(), f.env, instar, "metadata", "seal", "--record", record, "--key", filepath.Join(dir, "key"), "--recipient", id.Recipient().String(), "--store", f.url)
		if out, err := seal.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", f.name, err, out)
		}
		fleet := make([]*service, 2)
		base := make([]string, 2)
		for i := range fleet {
			addr := freeport.Address(freeport.Port(t))
			s := &service{dir: t.TempDir(), env: f.env}
			s.control, s.access = filepath.Join(s.dir, "ctl.sock"), filepath.Join(s.dir, "access.log")
			// A later --instances replaces the directory's.
			s.start(t, "--listen", addr, "--instances", f.url, "--signers", signers, "--identity", identity)
			fleet[i], base[i] = s, "http://"+addr
		}
		if got := here.curl(t, base[1]+"/latest/user-data"); got != "200 sealed" {
			t.Errorf("%s: user data: %q", f.name, got)
		}
		token := strings.TrimPrefix(here.curl(t, "-X", "PUT", "-H", ttl, base[0]+putToken), "200 ")
		use := func(path string) string {
			return here.curl(t, "-H", "X-aws-ec2-metadata-token: "+token, base[1]+path)
		}
		if got := use(instanceID); got != "200 i-1" {
			t.Errorf("%s: one server's token at the other: %q", f.name, got)
		}
		// Changes at both at once: none is lost.
		var wg sync.WaitGroup
		for i := range fleet {
			wg.Go(func() {
				for k := range 5 {
					state := []string{"InService", "Standby"}[(k+i)%2]
					if out, err := here.command(t.Context(), nil, instar, "metadata", "ctl", "--control", fleet[i].control, "revoke", "i-1").CombinedOutput(); err != nil {
						t.Errorf("%s: %v\n%s", f.name, err, out)
					}
					if out, err := here.command(t.Context(), nil, instar, "metadata", "ctl", "--control", fleet[i].control, "event", "i-1", "lifecycle", state).CombinedOutput(); err != nil {
						t.Errorf("%s: %v\n%s", f.name, err, out)
					}
				}
			})
		}
		wg.Wait()
		fleet[0].ctl(t, "event", "i-1", "spot", "stop", "2030-01-02T03:04:05Z")
		fleet[0].ctl(t, "ticket", "i-1", "withdraw")
		for i := range fleet {
			fleet[i].ctl(t, "reload") // rather than wait for it
			out := fleet[i].ctl(t, "show", "i-1")
			for _, want := range []string{`"generation": 10`, `"ticket": "completed"`, `"target-lifecycle-state"`} {
				if !strings.Contains(out, want) {
					t.Errorf("%s: server %d lacks %s: %s", f.name, i, want, out)
				}
			}
		}
		if got := use(instanceID); !strings.HasPrefix(got, "401") {
			t.Errorf("%s: a token revoked at the other server: %q", f.name, got)
		}
		if got := here.curl(t, base[1]+"/latest/meta-data/spot/instance-action"); got != `200 {"action":"stop","time":"2030-01-02T03:04:05Z"}` {
			t.Errorf("%s: an event set at the other server: %q", f.name, got)
		}
	}
}
