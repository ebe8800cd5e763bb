package diff_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/agent/diff"
	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

type quiet struct{}

func (quiet) Phase(string, int64) {}
func (quiet) Add(int64)           {}
func (quiet) Note(string)         {}
func (quiet) Warn(string, string) {}

// lab captures trees into one store.
type lab struct {
	t     *testing.T
	dir   string
	store *images.Store
	o     capture.ImageOptions
}

func newLab(t *testing.T) *lab {
	t.Helper()
	m := machine.Open(machine.Options{Dir: t.TempDir(), Create: true})
	ids, err := m.Identities()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := m.Signer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	owner, err := m.Owner()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	objects, err := upload.Open(t.Context(), "file://"+dir, upload.Options{CreateDir: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { objects.Close() })
	s, err := images.Open(objects, images.Options{
		Trust: keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: signer.Public()}), Identities: ids,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &lab{t: t, dir: dir, store: s, o: capture.ImageOptions{
		Store: s, Domain: "default", Owner: owner, Signer: signer, Recipients: []*keys.Recipient{ids[0].Recipient()}, Tool: "instar test",
	}}
}

// capture makes an image called name of a tree; full: whatever there was before.
func (l *lab) capture(tree, name string, full bool) diff.Side {
	l.t.Helper()
	o := l.o
	o.Volume = capture.VolumeOptions{Root: rootfs.Options{Volume: tree, NoFilter: true}, Size: 64 << 20}
	o.Name, o.Full = name, full
	if _, err := capture.CreateImage(l.t.Context(), o, quiet{}); err != nil {
		l.t.Fatal(err)
	}
	return l.open(name)
}

// index opens an image, with nothing cached.
func (l *lab) index(name string) *chunked.Index {
	l.t.Helper()
	img, err := l.store.Resolve(l.t.Context(), name, images.ResolveOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	x, err := img.Open(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	return x
}

func (l *lab) stream(x *chunked.Index, name string) *chunked.Stream {
	l.t.Helper()
	s, err := x.Stream(name)
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

func (l *lab) open(name string) diff.Side {
	l.t.Helper()
	x := l.index(name)
	s := l.stream(x, chunked.StreamLayout)
	layout, err := ext4.ReadLayout(io.NewSectionReader(s.ReaderAt(l.t.Context(), 1<<20), 0, s.Size()))
	if err != nil {
		l.t.Fatal(err)
	}
	return diff.Side{Layout: layout, Disk: l.stream(x, chunked.StreamDisk)}
}

// compare is the differences as "kind path bytes", in their order.
func compare(t *testing.T, a, b diff.Side) []string {
	t.Helper()
	var out []string
	for d, err := range diff.Images(t.Context(), a, b) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%s %s %d", d.Kind, d.Path, d.Bytes))
	}
	return out
}

func script(t *testing.T, dir, s string) {
	t.Helper()
	loopfs.Run(t, "bash", "-ec", "cd \"$1\"\n"+s, "bash", dir)
}

func TestKinds(t *testing.T) {
	tree := t.TempDir()
	script(t, tree, `
mkdir -p a/b gone same
for i in $(seq 40); do echo "file $i" >same/f$i; done
head -c 1000000 /dev/urandom >a/large; head -c 5000 /dev/urandom >a/appended; head -c 9000 /dev/urandom >a/cut
echo x >a/b/moved; echo 12345 >a/overwritten; echo linked >a/one; ln a/one a/two; ln -s one a/soft
truncate -s 1M a/holes; echo "was a file" >a/typed; echo touched >a/touched; echo in >gone/in; : >a/empty`)
	l := newLab(t)
	before := l.capture(tree, "web", false)
	if got := compare(t, before, before); len(got) > 0 {
		t.Errorf("an image differs from itself: %q", got)
	}
	script(t, tree, `
printf X | dd of=a/large bs=1 seek=500000 conv=notrunc status=none
echo more >>a/appended; truncate -s 4096 a/cut
mv a/b/moved a/b/renamed; echo 67890 >a/overwritten; rm a/two
printf data | dd of=a/holes bs=1 seek=500000 conv=notrunc status=none
rm a/typed; mkdir a/typed; touch -d 2001-02-03 a/touched; rm -r gone; echo new >a/empty`)
	after := l.capture(tree, "web", false)
	want := []string{
		"removed gone 0", "changed a/appended 5", "changed a/cut 0", "changed a/empty 4", "changed a/holes 4096",
		"changed a/large 4096", "changed a/overwritten 6", "touched a/touched 0", "removed a/two 0", "changed a/typed 0",
		"removed a/b/moved 0", "added a/b/renamed 2", "removed gone/in 0", "touched a/one 0",
	}
	got := compare(t, before, after)
	slices.Sort(want)
	sorted := slices.Sorted(slices.Values(got))
	if !slices.Equal(sorted, want) {
		t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(sorted, "\n"), strings.Join(want, "\n"))
	}
	// Whichever way the second was laid out, the differences are the same.
	if full := slices.Sorted(slices.Values(compare(t, before, l.capture(tree, "afresh", true)))); !slices.Equal(full, want) {
		t.Errorf("laid out afresh:\n%s", strings.Join(full, "\n"))
	}
}

// TestRegrouped has equal content that is stored in other chunks.
func TestRegrouped(t *testing.T) {
	l := newLab(t)
	tree, other := t.TempDir(), t.TempDir()
	fill := `for i in $(seq 100); do seq $i $((i + 500)) >f$i; done; seq 300000 >large`
	script(t, tree, fill)
	script(t, other, fill+"; for i in $(seq 100); do head -c 3000 /dev/urandom >e$i; done; truncate -s 40k large; seq 300000 >large")
	for _, d := range compare(t, l.capture(tree, "a", false), l.capture(other, "b", false)) {
		if !strings.HasPrefix(d, "added e") && !strings.HasPrefix(d, "touched ") {
			t.Errorf("equal content: %s", d)
		}
	}
}

// TestRandom compares the differences with what was done to a tree.
func TestRandom(t *testing.T) {
	l := newLab(t)
	tree := t.TempDir()
	r := rand.New(rand.NewPCG(5, 5))
	content := map[string][]byte{}
	path := func(name string) string { return filepath.Join(tree, name) }
	put := func(name string, p []byte) {
		content[name] = p
		if err := os.WriteFile(path(name), p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	random := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.Uint32() | 1)
		}
		return p
	}
	for i := range 120 {
		put(fmt.Sprintf("f%03d", i), random(1+r.IntN(40_000)))
	}
	before := l.capture(tree, "web", false)
	for round := range 4 {
		old := maps.Clone(content)
		for range 30 {
			name := fmt.Sprintf("f%03d", r.IntN(150))
			p, there := content[name]
			switch {
			case !there, r.IntN(4) == 0:
				put(name, random(1+r.IntN(40_000)))
			case r.IntN(3) == 0:
				delete(content, name)
				if err := os.Remove(path(name)); err != nil {
					t.Fatal(err)
				}
			default:
				p = slices.Clone(p)
				p[r.IntN(len(p))] ^= 2
				put(name, p)
			}
		}
		var want []string
		for name, p := range content {
			was, there := old[name]
			if !there {
				want = append(want, fmt.Sprintf("added %s %d", name, len(p)))
				continue
			}
			bytes := 0
			for i := 0; i < len(p); i += 4096 {
				end := min(i+4096, len(p))
				if i >= len(was) {
					bytes += end - i
				} else if string(p[i:end]) != string(was[i:min(end, len(was))]) {
					bytes += end - i
				}
			}
			if bytes > 0 || len(p) != len(was) {
				want = append(want, fmt.Sprintf("changed %s %d", name, bytes))
			}
		}
		for name := range old {
			if _, there := content[name]; !there {
				want = append(want, fmt.Sprintf("removed %s 0", name))
			}
		}
		after := l.capture(tree, "web", false)
		var got []string
		for _, d := range compare(t, before, after) {
			if !strings.HasPrefix(d, "touched ") {
				got = append(got, d)
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Fatalf("round %d:\n%s\nwant:\n%s", round, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		before = after
	}
}

// TestHostile compares with layouts that say what is not so: errors, no panics.
func TestHostile(t *testing.T) {
	l := newLab(t)
	tree := t.TempDir()
	script(t, tree, `mkdir d; for i in $(seq 30); do head -c $((i * 3000)) /dev/urandom >d/f$i; done`)
	a := l.capture(tree, "a", false)
	script(t, tree, `for i in $(seq 30); do head -c $((i * 3000)) /dev/urandom >d/f$i; done`)
	b := l.capture(tree, "b", false)
	for _, offset := range []int64{1 << 20, 63 << 20, 64 << 20, 1 << 40, 1 << 62, -4096, -1 << 62} {
		b.Offset = offset
		for _, err := range diff.Images(t.Context(), a, b) {
			if err != nil {
				break
			}
		}
	}
	b.Offset = 0
	if err := os.RemoveAll(filepath.Join(l.dir, "packs")); err != nil {
		t.Fatal(err)
	}
	for _, err := range diff.Images(t.Context(), l.open2("a", a), l.open2("b", b)) {
		if err != nil {
			if !errors.Is(err, chunked.ErrMissing) {
				t.Errorf("packs are gone: %v", err)
			}
			return
		}
	}
	t.Error("content was compared that is not there")
}

// open2 opens an image's disk again, with nothing cached.
func (l *lab) open2(name string, s diff.Side) diff.Side {
	l.t.Helper()
	s.Disk = l.stream(l.index(name), chunked.StreamDisk)
	return s
}

// TestHurt names exactly the files whose bytes are in damaged ranges.
func TestHurt(t *testing.T) {
	l := newLab(t)
	tree := t.TempDir()
	script(t, tree, `mkdir d; for i in $(seq 60); do head -c $((i * 2000)) /dev/urandom >d/f$i; done; ln d/f7 again`)
	s := l.capture(tree, "web", false)
	type piece struct {
		path     string
		from, to int64
	}
	var pieces []piece
	links := map[string][]string{}
	byInode := map[uint32]string{}
	for f := range s.Layout.Files() {
		if first, ok := byInode[f.Ino]; ok {
			links[first] = append(links[first], f.Path)
			continue
		}
		byInode[f.Ino] = f.Path
		for _, d := range f.Data {
			pieces = append(pieces, piece{f.Path, d.Pos, d.Pos + d.Len})
		}
	}
	if len(pieces) < 60 || len(links) != 1 {
		t.Fatalf("%d pieces, links %q", len(pieces), links)
	}
	r := rand.New(rand.NewPCG(3, 9))
	const offset = 1 << 20
	for range 200 {
		var spans []diff.Span
		var want []string
		total, covered := int64(0), int64(0)
		for at := int64(0); at < 8<<20; {
			at += r.Int64N(2 << 20)
			n := 1 + r.Int64N(100_000)
			spans = append(spans, diff.Span{From: offset + at, To: offset + at + n})
			total += n
			for _, p := range pieces {
				if k := min(p.to, at+n) - max(p.from, at); k > 0 {
					covered += k
					want = append(append(want, p.path), links[p.path]...)
				}
			}
			at += n + 1
		}
		r.Shuffle(len(spans), func(i, j int) { spans[i], spans[j] = spans[j], spans[i] })
		names, rest := diff.Hurt(s.Layout, offset, spans)
		slices.Sort(want)
		want = slices.Compact(want)
		slices.Sort(names)
		if !slices.Equal(names, want) || rest != total-covered {
			t.Fatalf("%v: %q, %d; want %q, %d", spans, names, rest, want, total-covered)
		}
	}
}
