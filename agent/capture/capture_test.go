package capture_test

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/upload"
)

// quiet is a Reporter that counts.
type quiet struct {
	total, added atomic.Int64
	mu           sync.Mutex
	warned       []string
}

func (q *quiet) Phase(_ string, total int64) {
	if total > 0 { // publishing has no bytes to count
		q.total.Store(total)
		q.added.Store(0)
	}
}
func (q *quiet) Add(n int64) { q.added.Add(n) }
func (q *quiet) Note(string) {}
func (q *quiet) Warn(path, _ string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.warned = append(q.warned, path)
}

const keyDir = "../../bundle/ec2/testdata/fixtures/keys/"

func credentials(t *testing.T) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := keys.ReadPrivateKey(keyDir + "user-pk.pem")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := keys.ReadCertificate(keyDir + "user-cert.pem")
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func options(t *testing.T) ec2.BundleOptions {
	key, cert := credentials(t)
	return ec2.BundleOptions{Arch: "x86_64", Account: "111122223333", EC2Cert: cert, UserCert: cert, Key: key, PartSize: 16 << 10}
}

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func image(data []byte) ec2.Image {
	return capture.ReadImage(bytes.NewReader(data), "img", int64(len(data)))
}

type dirSource string

func (d dirSource) OpenPart(_ context.Context, name string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(d), name))
}

// opens checks that the bundle in dir is whole and holds data.
func opens(t *testing.T, dir string, data []byte) {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join(dir, "img.manifest.xml"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := ec2.ParseManifest(doc)
	if err != nil {
		t.Fatal(err)
	}
	key, _ := credentials(t)
	var out bytes.Buffer
	if err := ec2.UnbundleTo(t.Context(), ec2.UnbundleOptions{Key: key}, m, dirSource(dir), &out); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), data) {
		t.Errorf("the bundle holds other data")
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestDirKeepsTheOldBundleUntilTheNewIsWhole(t *testing.T) {
	dir := t.TempDir()
	old := noise(100_000)
	if _, err := capture.Bundle(t.Context(), options(t), image(old), &capture.Dir{Path: dir}, &quiet{}); err != nil {
		t.Fatal(err)
	}
	broken := capture.ReadImage(io.MultiReader(bytes.NewReader(noise(50_000)), failing{}), "img", 100_000)
	if _, err := capture.Bundle(t.Context(), options(t), broken, &capture.Dir{Path: dir}, &quiet{}); !errors.Is(err, errBroken) {
		t.Fatalf("a failing image gives %v", err)
	}
	opens(t, dir, old)
	if n := names(t, dir); slices.ContainsFunc(n, func(s string) bool { return strings.Contains(s, "partial") }) {
		t.Errorf("left behind: %v", n)
	}
	// what a killed run left is swept, and a shorter bundle leaves no stale part
	if err := os.Mkdir(filepath.Join(dir, ".img.partial-123"), 0o700); err != nil {
		t.Fatal(err)
	}
	short := noise(20_000)
	res, err := capture.Bundle(t.Context(), options(t), image(short), &capture.Dir{Path: dir}, &quiet{})
	if err != nil {
		t.Fatal(err)
	}
	opens(t, dir, short)
	if n := names(t, dir); len(n) != len(res.Manifest.Parts)+1 {
		t.Errorf("%d parts and a manifest, but %v", len(res.Manifest.Parts), n)
	}
}

var errBroken = errors.New("broken")

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errBroken }

func TestProgressAddsUp(t *testing.T) {
	q := &quiet{}
	if _, err := capture.Bundle(t.Context(), options(t), image(noise(70_000)), &capture.Dir{Path: t.TempDir()}, q); err != nil {
		t.Fatal(err)
	}
	if q.total.Load() != 70_000 || q.added.Load() != 70_000 {
		t.Errorf("%d of %d bytes were counted, want 70000", q.added.Load(), q.total.Load())
	}
}

// faulty fails the operation number at, before or after carrying it out.
type faulty struct {
	upload.Store
	at    int64
	apply bool
	n     atomic.Int64
	fired atomic.Bool
}

var errFault = errors.New("injected fault")

func (f *faulty) fault(op func() error) error {
	if f.n.Add(1) != f.at {
		return op()
	}
	f.fired.Store(true)
	if f.apply {
		_ = op()
	}
	return errFault
}

func (f *faulty) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (obj upload.Object, err error) {
	err = f.fault(func() (err error) { obj, err = f.Store.Put(ctx, key, body, size, o); return err })
	return obj, err
}

func (f *faulty) Stat(ctx context.Context, key string) (obj upload.Object, err error) {
	err = f.fault(func() (err error) { obj, err = f.Store.Stat(ctx, key); return err })
	return obj, err
}

// TestFaultAtEveryOperation fails each operation on the store in turn, not
// carried out or with its answer lost, until a run meets no fault: whatever
// fails, no manifest is seen, nothing stays, and the next run completes.
func TestFaultAtEveryOperation(t *testing.T) {
	data := noise(60_000)
	for _, apply := range []bool{false, true} {
		for at := int64(1); ; at++ {
			dir := t.TempDir()
			store, err := upload.OpenDir(dir, true)
			if err != nil {
				t.Fatal(err)
			}
			f := &faulty{Store: store, at: at, apply: apply}
			_, err = capture.Bundle(t.Context(), options(t), image(data), &capture.Bucket{Store: f}, &quiet{})
			if !f.fired.Load() {
				if err != nil {
					t.Fatalf("without a fault: %v", err)
				}
				if at < 5 {
					t.Fatalf("only %d operations", at-1)
				}
				opens(t, dir, data)
				break
			}
			if !errors.Is(err, errFault) {
				t.Errorf("fault %d (carried out %t) gives %v", at, apply, err)
			}
			if n := names(t, dir); len(n) != 0 {
				t.Errorf("fault %d (carried out %t) leaves %v", at, apply, n)
			}
			if _, err := capture.Bundle(t.Context(), options(t), image(data), &capture.Bucket{Store: store}, &quiet{}); err != nil {
				t.Errorf("the run after fault %d: %v", at, err)
			}
			opens(t, dir, data)
		}
	}
}

func TestBucketKeepsACompleteBundle(t *testing.T) {
	dir := t.TempDir()
	store, err := upload.OpenDir(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"img.part.07", "img.part.x", "img2.part.0"} {
		if _, err := upload.PutBytes(t.Context(), store, key, []byte("x"), upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	var removed []string
	data := noise(40_000)
	b := &capture.Bucket{Store: store, Removed: func(k string) { removed = append(removed, k) }}
	if _, err := capture.Bundle(t.Context(), options(t), image(data), b, &quiet{}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(removed, []string{"img.part.07"}) {
		t.Errorf("removed %v, want the one leftover part", removed)
	}
	_, err = capture.Bundle(t.Context(), options(t), image(noise(10)), &capture.Bucket{Store: store}, &quiet{})
	if !errors.Is(err, fs.ErrExist) {
		t.Errorf("a bundle of the same name gives %v, want fs.ErrExist", err)
	}
	opens(t, dir, data)
	if _, err = capture.Bundle(t.Context(), options(t), image(data[:10_000]), &capture.Bucket{Store: store, Replace: true}, &quiet{}); err != nil {
		t.Fatal(err)
	}
	opens(t, dir, data[:10_000])
}

func TestInterruptibleEndsWhileThePipeIsSilent(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	in := capture.Interruptible(ctx, r)
	if _, err := w.WriteString("abc"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2)
	for _, want := range []string{"ab", "c"} {
		n, err := in.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Fatalf("read %q, %v; want %q", buf[:n], err, want)
		}
	}
	go cancel()
	if _, err := in.Read(buf); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled read gives %v", err)
	}
}

func TestOpenImage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "hole")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 8<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	img, closeImage, err := capture.OpenImage(path, 8<<20+1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeImage()
	if n := img.Map.Bytes(); n > 64<<10 || img.Size != 8<<20+1 {
		t.Errorf("%d bytes of data in an image of %d that is a hole and one byte", n, img.Size)
	}
	for path, size := range map[string]int64{filepath.Join(dir, "hole"): 1, "/dev/null": 0, dir: 0, filepath.Join(dir, "nowhere"): 0} {
		if _, _, err := capture.OpenImage(path, size); err == nil {
			t.Errorf("OpenImage(%s, %d) succeeds", path, size)
		}
	}
}

// tree makes a volume of a few kinds of file.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	sh(t, dir, `mkdir -p data/deep/er etc; echo one > data/first; ln data/first data/deep/zz-link; ln -s first data/sym; mkfifo data/fifo
		mknod data/node c 1 3; truncate -s 3M data/sparse; printf x | dd of=data/sparse bs=1 seek=2M conv=notrunc status=none
		head -c 300000 /dev/urandom > data/big; chmod 4751 data/big; chown 12:34 data/deep; touch -d 1965-03-04 data/first
		setfattr -n user.color -v blue data/big; setcap cap_net_raw+ep data/big 2>/dev/null || true; setfacl -m u:77:r data/deep; touch data/empty`)
	return dir
}

func sh(t *testing.T, dir, script string) string {
	t.Helper()
	c := exec.Command("sh", "-ec", script)
	c.Dir = dir
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func TestOtherFilesystems(t *testing.T) {
	for _, kind := range []string{"xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			vol, out, scratch := tree(t), t.TempDir(), t.TempDir()
			q := &quiet{}
			v, err := capture.PlanVolume(t.Context(), capture.VolumeOptions{Root: rootfs.Options{Volume: vol}, FS: kind, Scratch: scratch}, q)
			if err != nil {
				t.Fatal(err)
			}
			img, err := v.Image(t.Context(), kind)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(out, kind)
			if err := capture.WriteImage(t.Context(), img, path, q); err != nil {
				t.Fatal(err)
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
			if n := names(t, scratch); len(n) != 0 || len(v.Changes()) != 0 || len(q.warned) != 0 {
				t.Errorf("left %v; changes %v; warnings %v", n, v.Changes(), q.warned)
			}
			mnt := t.TempDir()
			sh(t, out, "mount -o loop,ro "+path+" "+mnt)
			t.Cleanup(func() {
				if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			if diff := sh(t, vol, "rsync -aHAnc --itemize-changes --delete data/ "+mnt+"/data/"); diff != "" {
				t.Errorf("the image differs:\n%s", diff)
			}
			if got := sh(t, mnt, "getfattr -n user.color --only-values data/big; getcap data/big"); !strings.HasPrefix(got, "blue") || !strings.Contains(got, "cap_net_raw") {
				t.Errorf("attributes: %q", got)
			}
		})
	}
}

func TestScratchSpaceIsAskedForFirst(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(small, 0)
	_, err := capture.PlanVolume(t.Context(), capture.VolumeOptions{Root: rootfs.Options{Volume: tree(t)}, FS: "xfs", Scratch: small}, &quiet{})
	if !errors.Is(err, capture.ErrOption) || !strings.Contains(fmt.Sprint(err), "--scratch") {
		t.Errorf("no scratch space gives %v", err)
	}
}

// TestChangesAreToldAndHarmless changes files between the plan and the reading.
func TestChangesAreToldAndHarmless(t *testing.T) {
	vol, out := tree(t), t.TempDir()
	sh(t, vol, "for f in gone shrunk grown; do head -c 50000 /dev/urandom > data/$f; done")
	q := &quiet{}
	v, err := capture.PlanVolume(t.Context(), capture.VolumeOptions{Root: rootfs.Options{Volume: vol}, Size: 64 << 20}, q)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	sh(t, vol, "rm data/gone; truncate -s 100 data/shrunk; echo more >> data/grown")
	img, err := v.Image(t.Context(), "img")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(out, "img")
	if err := capture.WriteImage(t.Context(), img, path, q); err != nil {
		t.Fatal(err)
	}
	got := map[string]ext4.ChangeKind{}
	for _, c := range v.Changes() {
		got[c.Path] = c.Kind
	}
	want := map[string]ext4.ChangeKind{"data/gone": ext4.Vanished, "data/shrunk": ext4.Shrank, "data/grown": ext4.Grew}
	for path, kind := range want {
		if got[path] != kind && (kind != ext4.Grew || got[path] != ext4.Modified) {
			t.Errorf("%s: %v is told, want %v", path, got[path], kind)
		}
		if !slices.Contains(q.warned, path) {
			t.Errorf("no warning about %s", path)
		}
	}
	sh(t, out, "e2fsck -fn img")
	if err := capture.WriteImage(t.Context(), img, path, q); !errors.Is(err, fs.ErrExist) {
		t.Errorf("writing over an image gives %v", err)
	}
}
