package boot

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/initrd/eager"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// instarStore is a store with one Instar image, served over HTTP.
type instarStore struct {
	dir    string
	image  []byte
	ticket ticket.Ticket
	served atomic.Int64
	wrong  func(w http.ResponseWriter, r *http.Request) bool
}

func (s *instarStore) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.wrong != nil && s.wrong(w, r) {
		return
	}
	http.ServeFile(&countingWriter{w, &s.served}, r, filepath.Join(s.dir, r.URL.Path))
}

type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.n.Add(int64(len(p)))
	return w.ResponseWriter.Write(p)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Captured is an image in a store, as a ticket has it.
type Captured struct{ Name, Manifest, Signers, Identity string }

// Capture stores an image, with keys of its own.
func Capture(t testing.TB, objects upload.Store, image io.ReaderAt, size int64, m sparse.Map) Captured {
	t.Helper()
	ctx := t.Context()
	keyDir := t.TempDir()
	signer, err := keys.WriteSigningKey(filepath.Join(keyDir, "signing"), "test")
	check(t, err)
	id, err := keys.WriteIdentity(filepath.Join(keyDir, "identity"), time.Now())
	check(t, err)
	secret, err := os.ReadFile(filepath.Join(keyDir, "identity"))
	check(t, err)
	signers := keys.AllowedSigner{Principals: "*", Key: signer.Public()}
	store, err := images.Open(objects, images.Options{Trust: keys.NewAllowedSigners(signers), Identities: []*keys.Identity{id}, State: t.TempDir()})
	check(t, err)
	domain, err := store.Domain(ctx, "main", images.DomainOptions{Create: true, Creators: []*keys.Recipient{id.Recipient()}, Signer: signer})
	check(t, err)
	var owner chunked.Key
	rand.Read(owner[:])
	run, err := store.Begin(ctx, images.RunOptions{Image: "web", Domain: domain, Owner: owner})
	check(t, err)
	defer run.Close(ctx)
	w, err := chunked.NewWriter(ctx, chunked.WriterOptions{Domain: domain.Domain, Owner: owner, Sink: run, PackSize: 5 << 20})
	check(t, err)
	defer w.Close()
	stream, err := w.Stream(chunked.StreamDisk, size)
	check(t, err)
	c := w.Cutter(ctx, stream, chunked.CutterOptions{})
	check(t, c.CopySparse(image, m))
	check(t, c.Finish())
	res, err := w.Finish(ctx)
	check(t, err)
	pub, err := run.Publish(ctx, images.PublishOptions{
		Manifest: chunked.Manifest{
			Architecture: "x86_64", Partition: "none", Filesystem: "ext4", Streams: []chunked.Content{{Name: chunked.StreamDisk, Size: size}},
			Index: chunked.IndexRef{Root: res.Root, Segments: res.Segments}, Packs: res.Packs, Data: res.Data, Added: res.Added, Tool: "instar test",
		},
		IndexKey: res.IndexKey, Recipients: []*keys.Recipient{id.Recipient()}, Signer: signer,
	})
	check(t, err)
	return Captured{pub.Name.String(), chunked.ManifestKey("web", pub.Name), signers.String() + "\n", string(secret)}
}

// newInstarStore captures 24 MiB, half of it holes, in packs of 4.5 MiB.
func newInstarStore(t testing.TB) *instarStore {
	t.Helper()
	s := &instarStore{dir: t.TempDir(), image: make([]byte, 24<<20)}
	rng := mrand.New(mrand.NewPCG(4, 4))
	var m sparse.Map
	for off := int64(0); off < int64(len(s.image)); off += 2 << 20 {
		for i := range int64(1 << 20) {
			s.image[off+i] = byte(rng.Uint32())
		}
		m = m.Append(sparse.Extent{Off: off, Len: 1 << 20})
	}
	objects, err := upload.Open(t.Context(), "file://"+s.dir, upload.Options{})
	check(t, err)
	defer objects.Close()
	c := Capture(t, objects, bytes.NewReader(s.image), int64(len(s.image)), m)
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.ticket = ticket.Ticket{
		Version: 1, InstanceID: "i-1", Format: "instar", Store: "s3://bucket", Manifest: c.Manifest, ManifestSHA256: c.Name,
		Signers: c.Signers, IndexKey: c.Identity, Objects: make(map[string]string),
	}
	check(t, filepath.WalkDir(s.dir, func(name string, d os.DirEntry, err error) error {
		if key, rerr := filepath.Rel(s.dir, name); err == nil && rerr == nil && d.Type().IsRegular() {
			s.ticket.Objects[filepath.ToSlash(key)] = server.URL + "/" + key
		}
		return err
	}))
	return s
}

// open opens the image as the initrd does, with what it says.
func (s *instarStore) open(t testing.TB, change func(*ticket.Ticket)) (image, *console, error) {
	t.Helper()
	tk := s.ticket
	if change != nil {
		change(&tk)
	}
	said := &console{}
	img, err := openTicket(t.Context(), &tk, "i-1", filepath.Join(s.dir, "signers"), &fetcher{
		client: http.DefaultClient, stall: time.Minute, access: &access{t: &tk}, say: said.say,
	})
	return img, said, err
}

type console struct {
	mu    sync.Mutex
	lines []string
}

func (c *console) say(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines = append(c.lines, fmt.Sprintf(format, args...))
}

// usedDisk is a disk that an earlier owner left full.
func usedDisk(t testing.TB, size int) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	check(t, err)
	t.Cleanup(func() { f.Close() })
	_, err = f.Write(bytes.Repeat([]byte("earlier"), size/7+1)[:size])
	check(t, err)
	return f
}

// failing is a medium whose power is cut after so many writes.
type failing struct {
	eager.Medium
	left atomic.Int32
}

var errCut = errors.New("power cut")

func (f *failing) WriteAt(p []byte, off int64) (int, error) {
	if f.left.Add(-1) < 0 {
		return 0, errCut
	}
	return f.Medium.WriteAt(p, off)
}

// TestInstarImage writes an Instar image over a used disk, cut short twice.
func TestInstarImage(t *testing.T) {
	s := newInstarStore(t)
	img, _, err := s.open(t, nil)
	check(t, err)
	id := img.identity("i-1")
	if id.Size != int64(len(s.image)) || !strings.HasPrefix(img.about(), "web ") {
		t.Fatalf("%s, %+v", img.about(), id)
	}
	disk := usedDisk(t, len(s.image)+1<<20)
	medium := eager.Device(disk, int64(len(s.image))+1<<20)
	before := s.served.Load()
	for _, writes := range []int32{12, 12} {
		cut := &failing{Medium: medium}
		cut.left.Store(writes)
		if err := eager.Write(t.Context(), cut, id, img); !errors.Is(err, errCut) {
			t.Fatalf("after a cut: %v", err)
		}
	}
	all := int64(12 << 20) // of chunks, which do not compress
	fetched := s.served.Load() - before
	img, said, err := s.open(t, nil)
	check(t, err)
	before = s.served.Load()
	check(t, eager.Write(t.Context(), medium, id, img))
	rest := s.served.Load() - before
	var kib int64
	if len(said.lines) < 1 {
		t.Fatal("nothing was said")
	}
	if _, err := fmt.Sscanf(said.lines[0], "root: resuming: %d KiB are on the disk already", &kib); err != nil || kib < 2<<10 {
		t.Errorf("it said %q", said.lines)
	}
	// Ranges may have in them what is not wanted, up to the next one.
	if rest > all-kib<<10+3<<20 {
		t.Errorf("%d of %d bytes were fetched before the cuts and %d after, with %d KiB on the disk", fetched, all, rest, kib)
	}
	got := make([]byte, len(s.image))
	_, err = disk.ReadAt(got, 0)
	check(t, err)
	if state, err := eager.StateOf(medium, id); err == nil && state == eager.Whole {
		t.Error("a record stands in an image's own first sector")
	}
	if !bytes.Equal(got, s.image) {
		t.Error("the disk is not the image")
	}
}

// TestInstarImageRefused has images and tickets that are not right.
func TestInstarImageRefused(t *testing.T) {
	s := newInstarStore(t)
	stranger, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "k"), "stranger")
	check(t, err)
	other := filepath.Join(t.TempDir(), "identity")
	_, err = keys.WriteIdentity(other, time.Now())
	check(t, err)
	secret, err := os.ReadFile(other)
	check(t, err)
	for _, c := range []struct {
		name, want string
		change     func(*ticket.Ticket)
	}{
		{"another signer", "sign", func(tk *ticket.Ticket) {
			tk.Signers = keys.AllowedSigner{Principals: "*", Key: stranger.Public()}.String()
		}},
		{"a signer of other images", "sign", func(tk *ticket.Ticket) { tk.Signers = strings.Replace(tk.Signers, "*", "db", 1) }},
		{"nobody trusted", "whose images", func(tk *ticket.Ticket) { tk.Signers = "" }},
		{"another identity", "index key", func(tk *ticket.Ticket) { tk.IndexKey = string(secret) }},
		{"no identity", "index-key", func(tk *ticket.Ticket) { tk.IndexKey = "x" }},
		{"another manifest", "its manifest is", func(tk *ticket.Ticket) { tk.ManifestSHA256 = strings.Repeat("ab", 32) }},
		{"another image's manifest", "neither a URL", func(tk *ticket.Ticket) { tk.Manifest = strings.Replace(tk.Manifest, "web", "db", 1) }},
		{"another instance", "it is of instance", func(tk *ticket.Ticket) { tk.InstanceID = "i-2" }},
	} {
		if _, _, err := s.open(t, c.change); err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, errFinal) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}

	// A pack that was changed: its chunk is not written, and nothing can be booted.
	s.wrong = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/packs/") {
			return false
		}
		data, err := os.ReadFile(filepath.Join(s.dir, r.URL.Path))
		if err != nil {
			return false
		}
		data[1<<20] ^= 1
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
		return true
	}
	img, _, err := s.open(t, nil)
	check(t, err)
	disk := usedDisk(t, len(s.image))
	err = eager.Write(t.Context(), eager.Device(disk, int64(len(s.image))), img.identity("i-1"), img)
	if !errors.Is(err, chunked.ErrCorrupt) {
		t.Errorf("a pack that was changed: %v", err)
	}
	head := make([]byte, eager.HeadSize)
	_, err = disk.ReadAt(head, 0)
	check(t, err)
	if len(bytes.Trim(head[eager.Sector:], "\x00")) > 0 {
		t.Error("there is something to boot on the disk")
	}
}
