// Package catalog proves the catalog's server with the clients people have: the
// AWS command line and boto3 of Debian, recorded requests of the AWS SDK for
// Go, Packer's sequence, and Chromium. The program serves catalogs that lie in a
// real MinIO.
package catalog

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
)

const (
	alice = "111122223333" // instar.Account: whose bundles the tests make
	bob   = "222233334444"

	region = "eu-home-1"
	other  = "us-home-1"
)

// accountsFile are the accounts of both regions' servers: those that the recorded
// requests of sdkRecord are replayed with.
const accountsFile = "../../upload/catalog/ec2api/testdata/sdk-accounts.yaml"

// folder is a directory of a test's own.
type folder struct{ dir string }

func (f folder) path(name string) string { return filepath.Join(f.dir, name) }

func (f folder) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(f.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// world is two regions: a MinIO with a catalog each, and a server over each.
type world struct {
	*instar.Instar
	minio *servers.Server
	folder
	bucket  string // of this region
	bucket2 string // of the other
	url     string // of this region's server
	url2    string
}

func newWorld(t *testing.T, args ...string) *world {
	t.Helper()
	w := prepare(t)
	w.url = w.serve(t, w.bucket, append([]string{"--other-region", other + "=" + w.store(w.bucket2) + "@127.0.0.1"}, args...)...)
	w.url2 = w.serve(t, w.bucket2, "--other-region", region+"="+w.store(w.bucket)+"@127.0.0.1")
	return w
}

// prepare makes a world whose servers are not started yet.
func prepare(t *testing.T) *world {
	t.Helper()
	w := &world{minio: servers.MinIO(t), folder: folder{t.TempDir()}}
	w.Instar = instar.New(t, w.minio.Env()...)
	w.bucket, w.bucket2 = "cat-here", "cat-there" // the server is this world's alone
	s3 := w.With("AWS_ACCESS_KEY_ID="+w.minio.AccessKey, "AWS_SECRET_ACCESS_KEY="+w.minio.SecretKey)
	w.Instar = s3
	for _, b := range []string{w.bucket, w.bucket2} {
		w.mb(t, b)
	}
	key := w.path("key")
	loopfs.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	pub, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, "signers", `* namespaces="instar-catalog,instar-task,instar-image,instar-head,instar-domain" `+string(pub))
	accounts, err := os.ReadFile(accountsFile)
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, "accounts.yaml", string(accounts))
	w.Want(t, instar.OK, w.on("catalog", "create", w.bucket, region)...)
	w.Want(t, instar.OK, w.on("catalog", "create", w.bucket2, other)...)
	return w
}

func (w *world) mb(t *testing.T, bucket string) {
	t.Helper()
	loopfs.Run(t, "curl", "-sS", "--fail", "--noproxy", "*", "--user", w.minio.AccessKey+":"+w.minio.SecretKey,
		"--aws-sigv4", "aws:amz:"+w.minio.Region+":s3", "-X", "PUT", w.minio.Endpoint+"/"+bucket)
}

func (w *world) store(bucket string) string { return "s3://" + bucket + "/fleet" }

// on is the command line of "catalog VERB" with a bucket's catalog.
func (w *world) on(group, verb, bucket string, args ...string) []string {
	return append([]string{group, verb, "--store", w.store(bucket), "--sign", w.path("key"), "--signers", w.path("signers")}, args...)
}

// serve starts a server and returns its URL. It ends in an orderly way.
func (w *world) serve(t *testing.T, bucket string, args ...string) string {
	t.Helper()
	url, _ := w.killable(t, bucket, args...)
	return url
}

// killable is serve, and what kills the server.
func (w *world) killable(t *testing.T, bucket string, args ...string) (url string, kill func()) {
	t.Helper()
	all := append(w.on("catalog", "serve", bucket, "--accounts", w.path("accounts.yaml"), "--listen", "127.0.0.1:0", "--access-log", w.path("access-"+bucket)), args...)
	p := serveCatalog(t, w.Instar, all...)
	return p.url, func() { p.kill(t) }
}

// clean is the environment of a client.
func (w *world) clean(more ...string) []string {
	return append([]string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + w.dir, "LC_ALL=C.UTF-8", "AWS_EC2_METADATA_DISABLED=true", "AWS_PAGER=",
		"AWS_ACCESS_KEY_ID=AKALICE", "AWS_SECRET_ACCESS_KEY=alice-secret-key", "AWS_DEFAULT_REGION=" + region, "AWS_REGION=" + region, "NO_PROXY=*",
		"INSTAR_URL=" + w.url, "INSTAR_URL2=" + w.url2,
	}, more...)
}

// run runs a client and returns its output; it must end well.
func (w *world) run(t *testing.T, env []string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env, cmd.Dir = env, w.dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, tail(out.String()), tail(errs.String()))
	}
	return out.String()
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

// bundle makes an EC2 bundle of a small image in this region's bucket, and
// returns the location of its manifest.
func (w *world) bundle(t *testing.T, name string) string {
	t.Helper()
	img := w.path(name + ".img")
	f, err := os.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, strings.Repeat("an image ", 1000)); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	w.Want(t, instar.OK, append([]string{"bundle-and-upload-image", "-i", img, "-p", name, "-b", w.bucket + "/bundles", "--batch"}, w.Bundling()...)...)
	return w.bucket + "/bundles/" + name + ".manifest.xml"
}

// drive is the path of the program that drives boto3.
func drive(t *testing.T) string {
	t.Helper()
	p, err := filepath.Abs("testdata/drive.py")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// open opens this region's catalog as a further writer.
func (w *world) open(t *testing.T) *catalog.Catalog {
	t.Helper()
	return w.openWith(t, nil)
}

func (w *world) openWith(t *testing.T, more func(*catalog.Options)) *catalog.Catalog {
	t.Helper()
	return openCatalog(t, w.minio, w.store(w.bucket), w.folder, more)
}

// openCatalog opens the catalog of a store, with the files key and signers of a
// directory.
func openCatalog(t *testing.T, on *servers.Server, place string, with folder, more func(*catalog.Options)) *catalog.Catalog {
	t.Helper()
	store, err := upload.Open(t.Context(), place, upload.Options{
		Endpoint: on.Endpoint, Region: on.Region, Credentials: &upload.Credentials{AccessKeyID: on.AccessKey, SecretAccessKey: on.SecretKey},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	signer, err := keys.ReadSigner(with.path("key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := keys.ReadAllowedSigners(with.path("signers"))
	if err != nil {
		t.Fatal(err)
	}
	o := catalog.Options{Trust: trust, Signer: signer, Region: region}
	if more != nil {
		more(&o)
	}
	k, err := catalog.Open(store, o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
