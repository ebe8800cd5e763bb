package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload/s3fault"
)

// bundled is a directory with a bundle "b" of some 20 parts, and its image.
func bundled(t testing.TB, i *instar.Instar) (dir, image string) {
	t.Helper()
	dir, image = t.TempDir(), diskImage(t, 32<<20)
	i.Want(t, instar.OK, append([]string{"bundle-image", "-i", image, "-p", "b", "-d", dir, "--part-size", "32768"}, i.Bundling()...)...)
	if n := len(names(t, dir)); n < 8 {
		t.Fatalf("%d files: too few parts for this test", n)
	}
	return dir, image
}

// killAt runs a command and kills it when the store gets its n-th request
// (from 0) that match accepts. It reports whether there was one.
func killAt(t testing.TB, i *instar.Instar, proxy *s3fault.Proxy, sig syscall.Signal, n int, match func(s3fault.Request) bool, args ...string) (code int, hit bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := i.Command(ctx, args...)
	started := make(chan struct{})
	seen := 0
	proxy.Plan(func(r s3fault.Request) s3fault.Fault {
		if !match(r) {
			return s3fault.None
		}
		if seen++; seen != n+1 {
			return s3fault.None
		}
		<-started
		hit = true
		_ = cmd.Process.Signal(sig)
		return s3fault.ResetFirst
	})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	close(started)
	_ = cmd.Wait()
	if ctx.Err() != nil {
		t.Fatalf("instar %q did not end", args)
	}
	proxy.Plan(nil)
	return cmd.ProcessState.ExitCode(), hit
}

func puts(r s3fault.Request) bool { return r.Method == "PUT" && strings.Contains(r.Path, ".part.") }
func gets(r s3fault.Request) bool { return r.Method == "GET" && strings.Contains(r.Path, ".part.") }

func count(log []s3fault.Request, match func(s3fault.Request) bool) (n int) {
	for _, r := range log {
		if match(r) {
			n++
		}
	}
	return n
}

func behindProxy(t testing.TB) (*servers.Server, *s3fault.Proxy, *instar.Instar) {
	t.Helper()
	server := servers.MinIO(t)
	proxy := s3fault.New(server.Endpoint)
	t.Cleanup(proxy.Close)
	return server, proxy, instar.New(t, server.Env()...).With("AWS_ENDPOINT_URL=" + proxy.URL)
}

// TestResume kills an upload and a download halfway: the same command then
// moves only what was missing.
func TestResume(t *testing.T) {
	server, proxy, i := behindProxy(t)
	dir, image := bundled(t, i)
	parts := len(names(t, dir)) - 1
	at := server.Bucket(t) + "/resume"

	upload := []string{"upload-bundle", "-m", dir + "/b.manifest.xml", "-b", at}
	if _, hit := killAt(t, i, proxy, syscall.SIGKILL, parts/2, puts, upload...); !hit {
		t.Fatal("the upload was not killed")
	}
	bucket, _, _ := strings.Cut(at, "/")
	there := len(server.Keys(t, bucket))
	if there == 0 || there >= parts || slices.ContainsFunc(server.Keys(t, bucket), func(k string) bool { return strings.Contains(k, "manifest") }) {
		t.Fatalf("after the kill the bucket holds %q", server.Keys(t, bucket))
	}
	proxy.Plan(nil)
	i.Want(t, instar.OK, upload...)
	// What was on its way when the client died may have arrived after the count.
	if sent := count(proxy.Log(), puts); sent == 0 || sent > parts-there {
		t.Errorf("the second upload sent %d parts, want at most %d", sent, parts-there)
	}

	down := t.TempDir()
	download := []string{"download-bundle", "-b", at, "-p", "b", "-d", down}
	if _, hit := killAt(t, i, proxy, syscall.SIGKILL, parts/2, gets, download...); !hit {
		t.Fatal("the download was not killed")
	}
	have := 0
	for _, n := range names(t, down) {
		if strings.HasPrefix(n, "b.part.") {
			have++
		}
	}
	if have == 0 {
		t.Fatalf("after the kill: %q", names(t, down))
	}
	// One that is there is damaged: it must be fetched again.
	damaged := filepath.Join(down, partName(t, down))
	data := []byte(read(t, damaged))
	data[100] ^= 1
	if err := os.WriteFile(damaged, data, 0o600); err != nil {
		t.Fatal(err)
	}
	proxy.Plan(nil)
	i.Want(t, instar.OK, download...)
	// That the damaged one is among them, unbundling shows.
	if got := count(proxy.Log(), gets); got == 0 || got > parts-have+1 {
		t.Errorf("the second download fetched %d parts, want at most %d", got, parts-have+1)
	}
	if left := len(names(t, down)); left != parts+1 {
		t.Errorf("%d files after the download, want %d: %q", left, parts+1, names(t, down))
	}
	back := t.TempDir()
	i.Want(t, instar.OK, "unbundle", "-m", down+"/b.manifest.xml", "-s", down, "-k", i.Keys.UserKey, "-d", back)
	sameFile(t, image, filepath.Join(back, "b"))
}

func partName(t testing.TB, dir string) string {
	t.Helper()
	for _, n := range names(t, dir) {
		if strings.HasPrefix(n, "b.part.") {
			return n
		}
	}
	t.Fatalf("no part in %q", names(t, dir))
	return ""
}

// TestInterrupt sends SIGINT and SIGTERM at several points of a capture that
// goes straight to storage: no manifest may be there, and the exit code tells.
// The command, run again, completes, and no stale part is left.
func TestInterrupt(t *testing.T) {
	server, proxy, i := behindProxy(t)
	root := smallVolume(t)
	bucket := server.Bucket(t)
	capture := vol(i, root, "-p", "b", "-b", bucket+"/x", "--part-size", "32768")
	for n, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGINT, syscall.SIGKILL} {
		code, hit := killAt(t, i, proxy, sig, n*3, puts, capture...)
		if !hit {
			t.Fatalf("%v: there was no such request", sig)
		}
		if sig != syscall.SIGKILL && code != instar.Interrupt {
			t.Errorf("%v: exit code %d, want %d", sig, code, instar.Interrupt)
		}
		for _, key := range server.Keys(t, bucket) {
			if strings.Contains(key, "manifest") {
				t.Errorf("%v: %s is in the bucket", sig, key)
			}
		}
	}
	server.Put(t, bucket, "x/b.part.9999", []byte("of an earlier, longer bundle"))
	i.Want(t, instar.OK, capture...)
	back := filepath.Join(t.TempDir(), "image")
	i.Want(t, instar.OK, "download-and-unbundle", "-b", bucket+"/x", "-p", "b", "-k", i.Keys.UserKey, "-d", back)
	fsck(t, back)
	if keys := server.Keys(t, bucket); slices.Contains(keys, "x/b.part.9999") {
		t.Errorf("a stale part is left: %q", keys)
	}
	i.Want(t, instar.OK, "delete-bundle", "-b", bucket+"/x", "-p", "b", "--batch", "-y")
	if keys := server.Keys(t, bucket); len(keys) != 0 {
		t.Errorf("after deletion the bucket holds %q", keys)
	}
}

// TestNotWritable finds out that a bucket cannot be written before anything is
// read or bundled, and says what the server said.
func TestNotWritable(t *testing.T) {
	server, proxy, i := behindProxy(t)
	dir, _ := bundled(t, i)
	root := smallVolume(t)
	bucket := server.Bucket(t)
	stranger := i.With("AWS_SECRET_ACCESS_KEY=wrong")
	for _, c := range []struct {
		name string
		i    *instar.Instar
		args []string
		says string
	}{
		{"upload, wrong secret", stranger, []string{"upload-bundle", "-m", dir + "/b.manifest.xml", "-b", bucket}, "SignatureDoesNotMatch"},
		{"capture, wrong secret", stranger, vol(i, root, "-p", "b", "-b", bucket), "SignatureDoesNotMatch"},
		{"no such endpoint", i.With("AWS_ENDPOINT_URL=http://127.0.0.1:1"), vol(i, root, "-p", "b", "-b", bucket), "127.0.0.1:1"},
		{"bucket name not allowed", i, vol(i, root, "-p", "b", "-b", "Not_A_Bucket!"), "Not_A_Bucket!"},
	} {
		t.Run(c.name, func(t *testing.T) {
			proxy.Plan(nil)
			r := c.i.Want(t, instar.S3, c.args...)
			if !strings.Contains(r.Stderr, c.says) {
				t.Errorf("does not say %q:\n%s", c.says, r)
			}
			if strings.Contains(r.Stderr, "wrong") && strings.Contains(r.Stderr, "secret_access_key=wrong") {
				t.Error("the secret is in the message")
			}
			if n := count(proxy.Log(), puts); n > 0 {
				t.Errorf("%d parts were sent", n)
			}
			if keys := server.Keys(t, bucket); len(keys) != 0 {
				t.Errorf("the bucket holds %q", keys)
			}
		})
	}
}

// TestPrivateCA needs the authority's certificate, from any of its places, and
// says so without it.
func TestPrivateCA(t *testing.T) {
	server := servers.MinIOTLS(t)
	i := instar.New(t, server.Env()...)
	dir, image := bundled(t, i)
	upload := []string{"upload-bundle", "-m", dir + "/b.manifest.xml", "-b", server.Bucket(t)}
	bare := i.With("AWS_CA_BUNDLE=")
	if r := bare.Want(t, instar.S3, upload...); !strings.Contains(r.Stderr, "certificate") || !strings.Contains(r.Stderr, "--ca-cert") {
		t.Errorf("the message helps nobody: %s", r)
	}
	bare.Want(t, instar.OK, append(upload, "--ca-cert", server.CACert)...)
	i.Want(t, instar.OK, upload...)
	back := filepath.Join(t.TempDir(), "image")
	i.Want(t, instar.OK, "download-and-unbundle", "-b", upload[4], "-p", "b", "-k", i.Keys.UserKey, "-d", back)
	sameFile(t, image, back)
}
