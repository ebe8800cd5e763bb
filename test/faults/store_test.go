package faults

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload/s3fault"
)

// remote is a world with a MinIO behind a proxy that lets requests go wrong.
type remote struct {
	*world
	server *servers.Server
	proxy  *s3fault.Proxy
	bucket string // holds the world's bundle below "ready"
}

func newRemote(t testing.TB) *remote {
	t.Helper()
	r := &remote{world: newWorld(t), server: servers.MinIO(t)}
	r.proxy = s3fault.New(r.server.Endpoint)
	t.Cleanup(r.proxy.Close)
	r.Instar = r.With(r.server.Env()...).With("AWS_ENDPOINT_URL=" + r.proxy.URL)
	r.bucket = r.server.Bucket(t)
	r.Want(t, instar.OK, "upload-bundle", "-m", r.bundle+"/b.manifest.xml", "-b", r.bucket+"/ready")
	return r
}

// transfer is a command that talks to the store.
type transfer struct {
	name  string
	args  func(r *remote, prefix, dir string) []string
	whole func(t testing.TB, r *remote, prefix, dir string)
	sound func(t testing.TB, r *remote, prefix, dir string)
	// ready says that the command starts from a bundle of its own at prefix.
	ready bool
	// prepare, if not nil, puts there what else it starts from.
	prepare func(t testing.TB, r *remote, prefix string)
}

func transfers() []transfer {
	opens := func(t testing.TB, r *remote, prefix, image string) {
		t.Helper()
		back := filepath.Join(t.TempDir(), "image")
		r.Want(t, instar.OK, "download-and-unbundle", "-b", r.bucket+"/"+prefix, "-p", "b", "-k", r.Keys.UserKey, "-d", back)
		if image != "" {
			same(t, image, back)
		}
	}
	// A manifest in the bucket has all its parts.
	manifest := func(t testing.TB, r *remote, prefix, _ string) {
		t.Helper()
		for _, key := range r.server.Keys(t, r.bucket) {
			if key == prefix+"/b.manifest.xml" {
				opens(t, r, prefix, "")
			}
		}
	}
	return append(imageTransfers(), []transfer{
		{
			name: "bundle-vol",
			args: func(r *remote, prefix, _ string) []string {
				return append([]string{
					"bundle-vol", "-v", r.tree, "--no-filter", "--no-inherit", "--size", "auto", "-p", "b",
					"-b", r.bucket + "/" + prefix, "--part-size", partSize(),
				}, r.Bundling()...)
			},
			whole: func(t testing.TB, r *remote, prefix, _ string) { opens(t, r, prefix, "") },
			sound: manifest,
		},
		{
			name: "upload-bundle",
			args: func(r *remote, prefix, _ string) []string {
				return []string{"upload-bundle", "-m", r.bundle + "/b.manifest.xml", "-b", r.bucket + "/" + prefix}
			},
			whole: func(t testing.TB, r *remote, prefix, _ string) { opens(t, r, prefix, r.image) },
			sound: manifest,
		},
		{
			name: "download-bundle",
			args: func(r *remote, _, dir string) []string {
				return []string{"download-bundle", "-b", r.bucket + "/ready", "-p", "b", "-d", dir}
			},
			whole: func(t testing.TB, r *remote, _, dir string) { bundleOpens(t, r.world, dir, r.image) },
			sound: func(t testing.TB, r *remote, _, dir string) { partsWhole(t, r.world, dir) },
		},
		{
			name: "download-and-unbundle",
			args: func(r *remote, _, dir string) []string {
				return []string{"download-and-unbundle", "-b", r.bucket + "/ready", "-p", "b", "-k", r.Keys.UserKey, "-d", dir + "/image"}
			},
			whole: func(t testing.TB, r *remote, _, dir string) { same(t, r.image, dir+"/image") },
			sound: func(t testing.TB, r *remote, _, dir string) { absentOrSame(t, r.image, dir+"/image") },
		},
		{
			name: "migrate-bundle",
			args: func(r *remote, prefix, _ string) []string {
				return []string{
					"migrate-bundle", "-c", r.Keys.UserCert, "-k", r.Keys.UserKey, "-m", "b.manifest.xml", "--no-mapping",
					"--kernel", "aki-00000001", "-b", r.bucket + "/ready", "-d", r.bucket + "/" + prefix, "--batch",
				}
			},
			whole: func(t testing.TB, r *remote, prefix, _ string) { opens(t, r, prefix, r.image) },
			sound: manifest,
		},
		{
			name: "delete-bundle", ready: true,
			args: func(r *remote, prefix, _ string) []string {
				return []string{"delete-bundle", "-b", r.bucket + "/" + prefix, "-p", "b", "-y", "--batch"}
			},
			whole: func(t testing.TB, r *remote, prefix, _ string) {
				t.Helper()
				for _, key := range r.server.Keys(t, r.bucket) {
					if strings.HasPrefix(key, prefix+"/") {
						t.Errorf("not deleted: %s", key)
					}
				}
			},
			sound: manifest,
		},
	}...)
}

// begin gives a transfer a prefix and a directory of its own.
func (r *remote) begin(t testing.TB, tr transfer) (prefix, dir string) {
	t.Helper()
	dir, err := os.MkdirTemp(t.TempDir(), "p")
	if err != nil {
		t.Fatal(err)
	}
	prefix = filepath.Base(dir)
	r.proxy.Plan(nil)
	if tr.ready {
		r.Want(t, instar.OK, "upload-bundle", "-m", r.bundle+"/b.manifest.xml", "-b", r.bucket+"/"+prefix)
	}
	if tr.prepare != nil {
		tr.prepare(t, r, prefix)
	}
	return prefix, dir
}

// end clears away what a transfer stored.
func (r *remote) end(t testing.TB, prefix string) {
	t.Helper()
	for _, key := range r.server.Keys(t, r.bucket) {
		if strings.HasPrefix(key, prefix+"/") {
			r.server.Delete(t, r.bucket, key)
		}
	}
}

// TestKillAtEveryRequest kills each command when its first request reaches the
// server, its second, and so on: once before the server sees it, once after it
// has done what was asked and before the reply. Each time the command is run
// again.
func TestKillAtEveryRequest(t *testing.T) {
	r := newRemote(t)
	total := 0
	for _, tr := range transfers() {
		t.Run(tr.name, func(t *testing.T) {
			points := 0
			for at := 0; ; at++ {
				hit := false
				for _, fault := range []s3fault.Fault{s3fault.ResetFirst, s3fault.LostReply} {
					prefix, dir := r.begin(t, tr)
					if hit = r.kill(t, at, fault, tr.args(r, prefix, dir)); !hit {
						tr.whole(t, r, prefix, dir)
						r.end(t, prefix)
						break
					}
					points++
					tr.sound(t, r, prefix, dir)
					rerun(t, r.Run(t, tr.args(r, prefix, dir)...))
					tr.whole(t, r, prefix, dir)
					r.end(t, prefix)
					if t.Failed() {
						t.Fatalf("killed at request %d (%s)", at, fault)
					}
				}
				if !hit {
					break
				}
			}
			t.Logf("%d kill points", points)
			if total += points; points < 4 {
				t.Errorf("only %d requests", points)
			}
		})
	}
	t.Logf("%d kill points in all", total)
}

// kill runs a command and kills it at a request, whose connection then fails
// one way or the other. It reports whether there was such a request.
func (r *remote) kill(t testing.TB, at int, fault s3fault.Fault, args []string) (hit bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := r.Command(ctx, args...)
	started := make(chan struct{})
	r.proxy.Plan(func(q s3fault.Request) s3fault.Fault {
		if q.Index != at {
			return s3fault.None
		}
		<-started
		hit = true
		_ = cmd.Process.Signal(unix.SIGKILL)
		return fault
	})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	close(started)
	err := cmd.Wait()
	r.proxy.Plan(nil)
	if !hit && err != nil {
		t.Fatalf("without a fault %q: %v", args, err)
	}
	return hit
}

// TestFaultAtEveryRequest lets each request go wrong once, each in another
// way: the command completes all the same, or says what is wrong, leaves
// nothing that is not whole, and completes when it is run again.
func TestFaultAtEveryRequest(t *testing.T) {
	r := newRemote(t)
	var faults []s3fault.Fault
	for _, f := range s3fault.All() {
		switch f {
		case s3fault.StallRequest, s3fault.StallReply, s3fault.StallBody, s3fault.Trickle:
			// Time-outs are the library's tests' business: they would take minutes here.
		default:
			faults = append(faults, f)
		}
	}
	next := 0
	for _, tr := range transfers() {
		t.Run(tr.name, func(t *testing.T) {
			survived, refused := 0, 0
			for n := 0; ; n++ {
				// In turn; in the long run each at each request.
				at, fault := n, faults[next%len(faults)]
				next += 5 // prime to their number: neighbours get other kinds
				if evidence.Wanted() {
					at, fault = n/len(faults), faults[n%len(faults)]
				}
				prefix, dir := r.begin(t, tr)
				r.proxy.Plan(s3fault.At(at, fault))
				res := r.Run(t, tr.args(r, prefix, dir)...)
				fired := r.proxy.Fired()
				r.proxy.Plan(nil)
				if fired == 0 && res.Code != 0 {
					t.Fatalf("without a fault: %s", res)
				}
				if res.Code == 0 {
					survived++
					tr.whole(t, r, prefix, dir)
				} else {
					refused++
					if !strings.Contains(res.Stderr, "error: ") || strings.Contains(res.Stderr, "panic") {
						t.Errorf("no clear line: %s", res)
					}
					tr.sound(t, r, prefix, dir)
					nothingHalf(t, dir)
					r.Want(t, instar.OK, tr.args(r, prefix, dir)...)
					tr.whole(t, r, prefix, dir)
				}
				r.end(t, prefix)
				if t.Failed() {
					t.Fatalf("request %d, %s", at, fault)
				}
				if fired == 0 {
					break
				}
			}
			if stray := r.proxy.Stray(); len(stray) > 0 {
				t.Errorf("requests followed a redirect to another host: %q", stray)
			}
			t.Logf("%d completed, %d ended with an error and completed when run again", survived, refused)
		})
	}
}
