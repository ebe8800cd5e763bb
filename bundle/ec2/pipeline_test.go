package ec2

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/cryptotest"
	"testing/iotest"
	"time"

	"go.uber.org/goleak"

	"github.com/instar-image/instar/bundle/sparse"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func extent(off, n int64) sparse.Extent { return sparse.Extent{Off: off, Len: n} }

// failingSink fails at the nth part.
type failingSink struct {
	*memStore
	mu  sync.Mutex
	n   int
	err error
}

func (s *failingSink) PutPart(ctx context.Context, p Part) error {
	s.mu.Lock()
	s.n--
	bad := s.n < 0
	s.mu.Unlock()
	if bad {
		return s.err
	}
	return s.memStore.PutPart(ctx, p)
}

func TestBundleStopsAtTheSinksError(t *testing.T) {
	boom := errors.New("boom")
	o := options(t)
	o.PartSize = MinPartSize
	data := patchwork(3_000_000, 1)
	for n := range 6 {
		sink := &failingSink{memStore: newMemStore(), n: n, err: boom}
		_, doc, err := Bundle(t.Context(), o, memoryImage("img", data, nil), sink)
		if !errors.Is(err, boom) || doc != nil || !strings.Contains(err.Error(), `storing part "img.part.`) {
			t.Errorf("at part %d: %v", n, err)
		}
	}
}

func TestBundleStopsAtTheImagesError(t *testing.T) {
	boom := errors.New("boom")
	o := options(t)
	for name, c := range map[string]struct {
		write func(context.Context, io.Writer) error
		want  string
		is    error
	}{
		"error": {func(context.Context, io.Writer) error { return boom }, "writing the image", boom},
		"short": {func(_ context.Context, w io.Writer) error { _, err := w.Write(make([]byte, 99)); return err }, "less data than its map says", errTooLittle},
		"long":  {func(_ context.Context, w io.Writer) error { _, err := w.Write(make([]byte, 101)); return err }, "more data than its map says", errTooMuch},
	} {
		img := Image{Name: "img", Size: 1000, Map: sparse.Map{{Off: 500, Len: 100}}, Write: c.write}
		_, doc, err := Bundle(t.Context(), o, img, newMemStore())
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) || doc != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBundleIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	o := options(t)
	img := Image{Name: "img", Size: 1 << 40, Write: func(ctx context.Context, w io.Writer) error {
		cancel()
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
		}
	}}
	if _, _, err := Bundle(ctx, o, img, newMemStore()); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestUnbundleIsCancelled(t *testing.T) {
	user := loadParty(t, "user")
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	ctx, cancel := context.WithCancel(t.Context())
	src := sourceFunc(func(ctx context.Context, name string) (io.ReadCloser, error) {
		if strings.HasSuffix(name, "05") {
			cancel()
		}
		return dirSource(fixture("ec2-full")).OpenPart(ctx, name)
	})
	if err := Unbundle(ctx, UnbundleOptions{Key: user.key}, m, src, &nowhere{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

type sourceFunc func(context.Context, string) (io.ReadCloser, error)

func (f sourceFunc) OpenPart(ctx context.Context, name string) (io.ReadCloser, error) {
	return f(ctx, name)
}

// Errors of the source and of the output come back as they are, not as
// something wrong with the bundle; and nothing is left behind.
func TestUnbundleErrorsOfOthers(t *testing.T) {
	user := loadParty(t, "user")
	boom := errors.New("boom")
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	o := UnbundleOptions{Key: user.key}
	dir := t.TempDir()
	good := dirSource(fixture("ec2-full"))
	for name, src := range map[string]PartSource{
		"open": sourceFunc(func(ctx context.Context, n string) (io.ReadCloser, error) {
			if strings.HasSuffix(n, "07") {
				return nil, boom
			}
			return good.OpenPart(ctx, n)
		}),
		"read": sourceFunc(func(ctx context.Context, n string) (io.ReadCloser, error) {
			if strings.HasSuffix(n, "07") {
				return io.NopCloser(iotest.ErrReader(boom)), nil
			}
			return good.OpenPart(ctx, n)
		}),
	} {
		err := UnbundleFile(t.Context(), o, m, src, filepath.Join(dir, "out"))
		var e *Error
		if !errors.Is(err, boom) || errors.As(err, &e) || !strings.Contains(err.Error(), "web-1.0.part.07") {
			t.Errorf("%s: %v", name, err)
		}
	}
	full := &failingOutput{left: 20000, err: boom}
	if err := Unbundle(t.Context(), o, m, good, full); !errors.Is(err, boom) {
		t.Errorf("output: %v", err)
	}
	if err := UnbundleFile(t.Context(), o, m, good, filepath.Join(dir, "no", "out")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

type failingOutput struct {
	nowhere
	left int
	err  error
}

func (o *failingOutput) Write(p []byte) (int, error) {
	if o.left -= len(p); o.left < 0 {
		return 0, o.err
	}
	return o.nowhere.Write(p)
}

// A short read at a time changes nothing.
func TestUnbundleFromSlowSource(t *testing.T) {
	user := loadParty(t, "user")
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	src := sourceFunc(func(ctx context.Context, n string) (io.ReadCloser, error) {
		r, err := dirSource(fixture("ec2-full")).OpenPart(ctx, n)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{iotest.DataErrReader(iotest.HalfReader(r)), r}, nil
	})
	img, err := unbundleBytes(t, UnbundleOptions{Key: user.key}, m, src)
	if err != nil || sha256Hex(img) != fixtureSHA256 {
		t.Errorf("%v", err)
	}
}

// An existing file stays as it is until, and unless, all is verified.
func TestUnbundleFileReplacesLast(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.Digest[0]++ // noticed at the very end
	o := UnbundleOptions{Key: f.user.key}
	if err := UnbundleFile(t.Context(), o, m, mapSource(good.parts), path); !errors.Is(err, ErrDigest) {
		t.Errorf("%v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Errorf("the old file is now %q", b)
	}
	m.Digest[0]--
	if err := UnbundleFile(t.Context(), o, m, mapSource(good.parts), path); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); !bytes.Equal(b, f.image) {
		t.Error("the new file is not the image")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// Nothing goes to a pipe or a device before all is verified.
func TestNothingBeforeAllIsVerified(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	o := UnbundleOptions{Key: f.user.key}
	dev := filepath.Join(t.TempDir(), "device")
	old := bytes.Repeat([]byte{0xee}, 1000)
	if err := os.WriteFile(dev, old, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *os.File {
		d, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	for _, breakIt := range []func(){
		func() { m.Digest[0]++ },
		func() { m.Digest[0]--; delete(good.parts, m.Parts[len(m.Parts)-1].Filename) },
	} {
		breakIt()
		var out bytes.Buffer
		if err := UnbundleTo(t.Context(), o, m, mapSource(good.parts), &out); err == nil || out.Len() > 0 {
			t.Errorf("to a pipe: %v, %d bytes", err, out.Len())
		}
		if err := UnbundleDevice(t.Context(), o, m, mapSource(good.parts), open()); err == nil {
			t.Error("to a device: no error")
		}
		if b, _ := os.ReadFile(dev); !bytes.Equal(b, old) {
			t.Error("the device was written to")
		}
	}
	good = f.good(t)
	var out bytes.Buffer
	if err := UnbundleTo(t.Context(), o, m, mapSource(good.parts), &out); err != nil || !bytes.Equal(out.Bytes(), f.image) {
		t.Errorf("to a pipe: %v", err)
	}
	if err := UnbundleDevice(t.Context(), o, m, mapSource(good.parts), open()); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(dev); !bytes.Equal(b, f.image) {
		t.Error("the device does not hold the image")
	}
}

// A real block device: old bytes under holes are gone, a small one is refused.
func TestUnbundleToBlockDevice(t *testing.T) {
	user := loadParty(t, "user")
	m := readManifest(t, fixture("ec2-basic", "fx.img.manifest.xml"))
	src := dirSource(fixture("ec2-basic"))
	for _, c := range []struct {
		size int64
		ok   bool
	}{{m.Size + 1<<20, true}, {m.Size - 4096, false}} {
		back := filepath.Join(t.TempDir(), "back")
		if err := os.WriteFile(back, bytes.Repeat([]byte{0xee}, int(c.size)), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("losetup", "--find", "--show", back).CombinedOutput()
		if err != nil {
			t.Fatalf("losetup: %v %s", err, out)
		}
		loop := strings.TrimSpace(string(out))
		t.Cleanup(func() {
			if out, err := exec.Command("losetup", "-d", loop).CombinedOutput(); err != nil {
				t.Errorf("losetup -d: %v %s", err, out)
			}
		})
		d, err := os.OpenFile(loop, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = UnbundleDevice(t.Context(), UnbundleOptions{Key: user.key}, m, src, d)
		if (err == nil) != c.ok {
			t.Errorf("device of %d bytes: %v", c.size, err)
		}
		got := make([]byte, m.Size)
		if _, err := d.ReadAt(got, 0); c.ok && (err != nil || sha256Hex(got) != fixtureSHA256) {
			t.Errorf("device holds another image: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnbundleStream(t *testing.T) {
	f := newForge(t)
	e := f.encrypted(gzipped(f.tar()))
	digest := SHA1(sha1Sum(f.tar()))
	wrong := digest
	wrong[0]++
	for _, c := range []struct {
		name string
		o    StreamOptions
		want error
	}{
		{"key alone", StreamOptions{Key: f.key, IV: f.iv}, nil},
		{"size and digest", StreamOptions{Key: f.key, IV: f.iv, Size: 700, SHA1: &digest}, nil},
		{"wrong size", StreamOptions{Key: f.key, IV: f.iv, Size: 701}, ErrSize},
		{"wrong digest", StreamOptions{Key: f.key, IV: f.iv, SHA1: &wrong}, ErrDigest},
		{"wrong key", StreamOptions{Key: f.iv, IV: f.iv}, ErrKey},
	} {
		var out bytes.Buffer
		err := UnbundleStream(t.Context(), c.o, iotest.OneByteReader(bytes.NewReader(bytes.Clone(e))), NewStreamOutput(&out))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err == nil && !bytes.Equal(out.Bytes(), f.image) {
			t.Errorf("%s: image differs", c.name)
		}
	}
	if err := UnbundleStream(t.Context(), StreamOptions{Key: f.key, IV: f.iv}, bytes.NewReader(e[:len(e)-16]), &nowhere{}); err == nil {
		t.Error("truncated: no error")
	}
}

// Same image, key and randomness: the same bytes, however the goroutines run.
func TestDeterministic(t *testing.T) {
	data := patchwork(150_000, 9)
	o := options(t)
	o.PartSize = 16 << 10
	key, iv := BlockKey{1}, BlockKey{2}
	o.EncKey, o.EncIV = &key, &iv
	var doc0 []byte
	var parts0 map[string][]byte
	for i := range 100 {
		cryptotest.SetGlobalRandom(t, 7)
		o.Workers, o.InFlight = 1+i%4, 1+i%3
		store := newMemStore()
		_, doc, err := Bundle(t.Context(), o, memoryImage("img", data, nil), store)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			doc0, parts0 = doc, store.parts
			continue
		}
		if !bytes.Equal(doc, doc0) || !maps.EqualFunc(store.parts, parts0, bytes.Equal) {
			t.Fatalf("run %d gives another bundle", i)
		}
	}
}

func TestTwoBundlesHaveDifferentKeys(t *testing.T) {
	a, b := newMemStore(), newMemStore()
	for _, s := range []*memStore{a, b} {
		if _, _, err := Bundle(t.Context(), options(t), memoryImage("img", make([]byte, 5000), nil), s); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(a.parts["img.part.0"], b.parts["img.part.0"]) {
		t.Error("the same image was encrypted to the same bytes twice")
	}
}

func TestPartNames(t *testing.T) {
	data := patchwork(500_000, 2)
	for _, c := range []struct {
		name   string
		naming Naming
		rename bool
		size   int
		first  string
	}{
		{"one part, renamed", NamingEC2, true, 0, "img.part.0"},
		{"one part, euca", NamingEuca, true, 0, "img.part.00"},
		{"many, renamed", NamingEC2, true, 32 << 10, "img.part.00"},
		{"zeros, worst case 13", NamingEC2, false, 16 << 10, "img.part.00"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options(t)
			o.Naming, o.PartSize = c.naming, c.size
			d := data
			if strings.HasPrefix(c.name, "zeros") {
				d = make([]byte, 200_000)
			}
			mem := newMemStore()
			var sink PartSink = mem
			if c.rename {
				sink = renamingStore{mem}
			}
			m, _, err := Bundle(t.Context(), o, memoryImage("img", d, nil), sink)
			if err != nil {
				t.Fatal(err)
			}
			if m.Parts[0].Filename != c.first {
				t.Errorf("first part is %q, want %q", m.Parts[0].Filename, c.first)
			}
			var listed []string
			for _, p := range m.Parts {
				listed = append(listed, p.Filename)
			}
			if stored := slices.Sorted(maps.Keys(mem.parts)); !slices.Equal(stored, listed) {
				t.Errorf("stored %v, listed %v", stored, listed)
			}
		})
	}
}

func TestBundleRefusesOptions(t *testing.T) {
	good := memoryImage("img", []byte("x"), nil)
	for name, change := range map[string]func(*BundleOptions, *Image){
		"no arch":         func(o *BundleOptions, _ *Image) { o.Arch = "" },
		"no account":      func(o *BundleOptions, _ *Image) { o.Account = "" },
		"account":         func(o *BundleOptions, _ *Image) { o.Account = "1234-5678" },
		"type":            func(o *BundleOptions, _ *Image) { o.Type = "toaster" },
		"no cloud":        func(o *BundleOptions, _ *Image) { o.EC2Cert = nil },
		"part size small": func(o *BundleOptions, _ *Image) { o.PartSize = 4080 },
		"part size odd":   func(o *BundleOptions, _ *Image) { o.PartSize = 10000001 },
		"part size large": func(o *BundleOptions, _ *Image) { o.PartSize = MaxPartSize + 16 },
		"mapping":         func(o *BundleOptions, _ *Image) { o.BlockDeviceMapping = []Mapping{{"ami", ""}} },
		"control":         func(o *BundleOptions, _ *Image) { o.KernelID = "a\x00" },
		"not utf-8":       func(o *BundleOptions, _ *Image) { o.RamdiskID = "a\xff" },
		"name":            func(_ *BundleOptions, i *Image) { i.Name = "a/b" },
		"no name":         func(_ *BundleOptions, i *Image) { i.Name = "" },
		"long name":       func(_ *BundleOptions, i *Image) { i.Name = strings.Repeat("n", 250) },
		"empty":           func(_ *BundleOptions, i *Image) { i.Size = 0 },
		"negative":        func(_ *BundleOptions, i *Image) { i.Size = -1 },
		"map":             func(_ *BundleOptions, i *Image) { i.Map = sparse.Map{{Off: 0, Len: 2}} },
	} {
		o, img := options(t), good
		change(&o, &img)
		store := newMemStore()
		_, _, err := Bundle(t.Context(), o, img, store)
		if !errors.Is(err, ErrOption) || len(store.parts) > 0 {
			t.Errorf("%s: %v, %d parts", name, err, len(store.parts))
		}
	}
}

// Without the user's certificate and key the manifest is as euca2ools makes
// it: empty elements and UNSIGNED.
func TestBundleUnsigned(t *testing.T) {
	cloud := loadParty(t, "ec2")
	o := options(t)
	o.UserCert, o.Key = nil, nil
	store := newMemStore()
	_, doc, err := Bundle(t.Context(), o, memoryImage("img", []byte("x"), nil), store)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<user_encrypted_key algorithm='AES-128-CBC'/>", "<user_encrypted_iv/>", "<signature>UNSIGNED</signature>"} {
		if !bytes.Contains(doc, []byte(want)) {
			t.Errorf("no %s in %s", want, doc)
		}
	}
	m := parsed(t, doc)
	if _, err := unbundleBytes(t, UnbundleOptions{Key: cloud.key}, m, store); !errors.Is(err, ErrUnsigned) {
		t.Errorf("not allowed: %v", err)
	}
	if b, err := unbundleBytes(t, UnbundleOptions{Key: cloud.key, AllowUnsigned: true}, m, store); err != nil || string(b) != "x" {
		t.Errorf("allowed: %v", err)
	}
}

// The document is laid out as ec2-ami-tools does, field for field.
func TestDocumentLayout(t *testing.T) {
	want, err := os.ReadFile(fixture("ec2-full", "web-1.0.manifest.xml"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseManifest(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.encode(loadParty(t, "user").key)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	m.Name, m.Ancestors, m.KernelName = "a&b<c>d'e\"é", []string{"ami-1", "ami-2"}, "vmlinuz"
	doc, err := m.encode(loadParty(t, "user").key)
	if err != nil {
		t.Fatal(err)
	}
	if want := "<name>a&amp;b&lt;c&gt;d&apos;e&quot;é</name><user>123456789012</user><type>machine</type><kernel_name>vmlinuz</kernel_name><ancestry><ancestor_ami_id>ami-1</ancestor_ami_id><ancestor_ami_id>ami-2</ancestor_ami_id></ancestry><digest"; !bytes.Contains(doc, []byte(want)) {
		t.Errorf("no %s in\n%s", want, doc)
	}
	again, err := ParseManifest(doc)
	if err != nil || again.Name != m.Name {
		t.Errorf("read back: %+v, %v", again, err)
	}
}

func TestVerifyReports(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	trust := []*rsa.PublicKey{f.user.pub()}
	bad := maps.Clone(good.parts)
	bad[m.Parts[1].Filename] = []byte("x")
	delete(bad, m.Parts[2].Filename)
	for _, c := range []struct {
		name     string
		o        VerifyOptions
		parts    map[string][]byte
		sig, arc string
		objects  []string
	}{
		{"shallow", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust}}, good.parts, "good", "not checked", nil},
		{"deep", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust, Key: f.cloud.key}}, good.parts, "good", "good", nil},
		{"manifest only", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust}, ManifestOnly: true}, nil, "good", "not checked", nil},
		{"nobody trusted", VerifyOptions{}, good.parts, "bad", "not checked", []string{"manifest"}},
		{"two bad parts", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust}}, bad, "good", "not checked", []string{objPart(m.Parts[1].Filename), objPart(m.Parts[2].Filename)}},
		{"two bad parts, deep", VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: trust, Key: f.user.key}}, bad, "good", "bad", []string{objPart(m.Parts[1].Filename), objPart(m.Parts[2].Filename)}},
	} {
		r, err := Verify(t.Context(), c.o, m, mapSource(c.parts))
		var objects []string
		for _, p := range r.Problems {
			objects = append(objects, p.Object)
		}
		if r.Signature != c.sig || r.Archive != c.arc || !slices.Equal(objects, c.objects) || (err == nil) != (len(objects) == 0) {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		if r.Signature == "good" && r.Signer != Fingerprint(f.user.pub()) {
			t.Errorf("%s: signer %s", c.name, r.Signer)
		}
	}
	wrong := *m
	wrong.Digest[0]++
	if r, err := Verify(t.Context(), VerifyOptions{UnbundleOptions: UnbundleOptions{Key: f.user.key}}, &wrong, mapSource(good.parts)); !errors.Is(err, ErrDigest) || r.Archive != "bad" || r.PartsGood != len(m.Parts) {
		t.Errorf("archive's digest: %+v, %v", r, err)
	}
}

func TestEncryptedManifestSchemeOne(t *testing.T) {
	f := newForge(t)
	key, err := rsa.GenerateKey(nil, 1024)
	if err != nil {
		t.Fatal(err)
	}
	doc := f.good(t).doc
	enc := f.encryptedManifest(t, &key.PublicKey, 1, doc)
	got, err := DecryptManifest(enc, key)
	if err != nil || !bytes.Equal(got, doc) {
		t.Errorf("%v", err)
	}
	if _, err := DecryptManifest(doc, key); !errors.Is(err, ErrFormat) {
		t.Errorf("not encrypted: %v", err)
	}
}

func TestErrorsReadWell(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	bad := maps.Clone(good.parts)
	bad["img.part.01"] = nil
	err := Unbundle(t.Context(), UnbundleOptions{Key: f.user.key}, m, mapSource(bad), &nowhere{})
	want := fmt.Sprintf(`unbundling "img": part "img.part.01": its 0 bytes have SHA-1 da39a3ee5e6b4b0d3255bfef95601890afd80709, the manifest says %s: damaged, or not this bundle's`, m.Parts[1].SHA1)
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

// A slow sink makes the rest wait instead of piling up parts.
func TestBackPressure(t *testing.T) {
	o := options(t)
	o.PartSize, o.InFlight = 64<<10, 2
	s := &countingSink{}
	if _, _, err := Bundle(t.Context(), o, memoryImage("img", patchwork(8_000_000, 4), nil), s); err != nil {
		t.Fatal(err)
	}
	if s.most > 2 {
		t.Errorf("%d parts in PutPart at a time, allowed are 2", s.most)
	}
}

type countingSink struct {
	mu        sync.Mutex
	now, most int
}

func (s *countingSink) PutPart(context.Context, Part) error {
	s.mu.Lock()
	s.now++
	s.most = max(s.most, s.now)
	s.mu.Unlock()
	time.Sleep(time.Millisecond)
	s.mu.Lock()
	s.now--
	s.mu.Unlock()
	return nil
}
