package images_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// people are the keys of a test: who signs, who is trusted, who may read.
type people struct {
	signer keys.Signer
	trust  *keys.AllowedSigners
	id     *keys.Identity
	owner  chunked.Key
}

func newPeople(t testing.TB) *people {
	t.Helper()
	dir := t.TempDir()
	signer, err := keys.WriteSigningKey(filepath.Join(dir, "signing"), "test")
	if err != nil {
		t.Fatal(err)
	}
	p := &people{signer: signer, id: newIdentity(t)}
	p.trust = keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: signer.Public()})
	if _, err := rand.Read(p.owner[:]); err != nil {
		t.Fatal(err)
	}
	return p
}

// newIdentity makes an ssh-ed25519 identity: the fastest there is.
func newIdentity(t testing.TB) *keys.Identity {
	t.Helper()
	name := filepath.Join(t.TempDir(), "identity")
	if _, err := keys.WriteSigningKey(name, "test"); err != nil {
		t.Fatal(err)
	}
	ids, err := keys.ReadIdentities(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ids[0]
}

func (p *people) options(state string) images.Options {
	return images.Options{Trust: p.trust, Identities: []*keys.Identity{p.id}, State: state, Local: func() time.Time { return epoch }, Parallel: 1}
}

func (p *people) open(t testing.TB, objects upload.Store, state string) *images.Store {
	t.Helper()
	s, err := images.Open(objects, p.options(state))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// captured is a tiny image: blocks of text, each a chunk, four to a segment.
const (
	blockSize    = 64
	segmentSize  = 4 * blockSize
	blocksOfPack = 3
)

func block(s string) []byte {
	b := make([]byte, blockSize)
	copy(b, s+" ")
	for i := len(s) + 1; i < blockSize; i++ {
		b[i] = byte(i*7 + len(s)) // text that does not compress away
	}
	return b
}

func text(blocks []string) []byte {
	var b []byte
	for _, s := range blocks {
		b = append(b, block(s)...)
	}
	return b
}

// capture takes an image as `create-image` does, with a machine's own key, and
// publishes it.
func (p *people) capture(ctx context.Context, s *images.Store, image string, blocks []string) (*images.Published, error) {
	d, err := s.Domain(ctx, "main", images.DomainOptions{Create: true, Creators: []*keys.Recipient{p.id.Recipient()}, Signer: p.signer})
	if err != nil {
		return nil, err
	}
	run, err := s.Begin(ctx, images.RunOptions{Image: image, Domain: d, Owner: p.owner, Refresh: -1})
	if err != nil {
		return nil, err
	}
	published, err := p.captureInto(ctx, s, run, d, blocks)
	return published, errors.Join(err, run.Close(ctx))
}

// captureUntil repeats the capture as long as garbage collection comes between.
func (p *people) captureUntil(ctx context.Context, s *images.Store, image string, blocks []string) (*images.Published, error) {
	for try := 0; ; try++ {
		pub, err := p.capture(ctx, s, image, blocks)
		if !errors.Is(err, images.ErrCollected) || try == 20 {
			return pub, err
		}
	}
}

func (p *people) captureInto(ctx context.Context, s *images.Store, run *images.Run, d *images.Domain, blocks []string) (*images.Published, error) {
	parent, err := run.Parent(ctx, "")
	if err != nil {
		return nil, err
	}
	b := &builder{ctx: ctx, run: run, d: d, owner: p.owner, packs: map[chunked.Name]int64{}, segments: map[chunked.Name]int64{}, at: map[chunked.Digest]chunked.Chunk{}}
	if parent != nil {
		if err := b.inherit(parent); err != nil {
			return nil, err
		}
	}
	if b.known, err = run.Known(ctx); err != nil {
		return nil, err
	}
	m, key, err := b.build(blocks)
	if err != nil {
		return nil, err
	}
	return run.Publish(ctx, images.PublishOptions{Manifest: *m, IndexKey: key, Recipients: []*keys.Recipient{p.id.Recipient()}, Signer: p.signer})
}

// captureExpiring publishes an image without parent whose head expires.
func (p *people) captureExpiring(ctx context.Context, run *images.Run, d *images.Domain, blocks []string, expires time.Duration) (*images.Published, error) {
	known, err := run.Known(ctx)
	if err != nil {
		return nil, err
	}
	b := &builder{ctx: ctx, run: run, d: d, owner: p.owner, known: known, packs: map[chunked.Name]int64{}, segments: map[chunked.Name]int64{}, at: map[chunked.Digest]chunked.Chunk{}}
	m, key, err := b.build(blocks)
	if err != nil {
		return nil, err
	}
	return run.Publish(ctx, images.PublishOptions{Manifest: *m, IndexKey: key, Recipients: []*keys.Recipient{p.id.Recipient()}, Signer: p.signer, Expires: expires})
}

// builder is a writer of tiny images: the format's one needs megabytes.
type builder struct {
	ctx      context.Context
	run      *images.Run
	d        *images.Domain
	owner    chunked.Key
	known    chunked.Known
	packs    map[chunked.Name]int64
	segments map[chunked.Name]int64
	at       map[chunked.Digest]chunked.Chunk // where chunks are that may be used
	old      []parentSegment
	added    int64
}

type parentSegment struct {
	ref chunked.SegmentRef
	seg *chunked.Segment
}

// inherit takes over what the parent has and may be shared.
func (b *builder) inherit(parent *images.Image) error {
	x, err := parent.Open(b.ctx)
	if err != nil {
		return err
	}
	for _, st := range x.Root().Streams {
		for _, ref := range st.Segments {
			seg, err := x.Segment(b.ctx, ref)
			if err != nil {
				return err
			}
			whole := b.run.UsableIndex(ref.Name)
			for i := range seg.Chunks {
				c := seg.Chunk(uint32(i))
				if b.run.UsablePack(c.At.Pack) {
					b.at[c.Digest] = c
				} else {
					whole = false
				}
			}
			if whole {
				b.old = append(b.old, parentSegment{ref, seg})
			}
		}
	}
	return nil
}

func (b *builder) build(blocks []string) (*chunked.Manifest, chunked.Key, error) {
	none := chunked.Key{}
	chunks := make([]chunked.Chunk, len(blocks))
	var fresh []int
	placed := map[chunked.Digest]int{}
	for i, s := range blocks {
		digest := chunked.DigestOf(block(s))
		if c, ok := b.at[digest]; ok {
			chunks[i] = c
		} else if at, ok := b.known.Lookup(b.d.ID(digest)); ok {
			chunks[i] = chunked.Chunk{Digest: digest, Key: b.d.ChunkKey(digest), Size: blockSize, At: at}
		} else if j, ok := placed[digest]; ok {
			placed[digest] = j
			fresh = append(fresh, i)
		} else {
			placed[digest] = i
			fresh = append(fresh, i)
		}
	}
	if err := b.store(blocks, chunks, fresh); err != nil {
		return nil, none, err
	}
	root := &chunked.Root{Streams: []chunked.RootStream{{Name: chunked.StreamDisk, Size: int64(len(blocks)) * blockSize}}}
	st := &root.Streams[0]
	for pos := 0; pos < len(blocks); pos += 4 {
		ref, err := b.segment(int64(pos)*blockSize, chunks[pos:min(pos+4, len(blocks))])
		if err != nil {
			return nil, none, err
		}
		st.Segments = append(st.Segments, ref)
	}
	plain, err := root.Encode()
	if err != nil {
		return nil, none, err
	}
	var key chunked.Key
	if _, err := rand.Read(key[:]); err != nil {
		return nil, none, err
	}
	// Not compressed: what compresses takes a millisecond to set up.
	data := chunked.AppendSeal(nil, key, chunked.TypeRoot, chunked.Stored, plain)
	n := chunked.NameOf(data)
	if err := b.run.PutIndex(b.ctx, n, data); err != nil {
		return nil, none, err
	}
	for _, c := range chunks {
		if _, ok := b.packs[c.At.Pack]; !ok {
			b.packs[c.At.Pack] = 0
		}
	}
	m := &chunked.Manifest{
		Architecture: "x86_64", Partition: "none", Filesystem: "ext4",
		Streams: []chunked.Content{{Name: chunked.StreamDisk, Size: st.Size}},
		Index:   chunked.IndexRef{Root: chunked.ObjectSize{Name: n, Size: int64(len(data))}, Segments: sizes(b.segments)},
		Packs:   sizes(b.packs), Data: st.Size, Added: b.added, Tool: "instar test",
	}
	return m, key, nil
}

func sizes(m map[chunked.Name]int64) []chunked.ObjectSize {
	l := []chunked.ObjectSize{}
	for n, s := range m {
		l = append(l, chunked.ObjectSize{Name: n, Size: s})
	}
	slices.SortFunc(l, func(a, b chunked.ObjectSize) int { return a.Name.Compare(b.Name) })
	return l
}

// store puts new chunks into packs.
func (b *builder) store(blocks []string, chunks []chunked.Chunk, fresh []int) error {
	done := map[chunked.Digest]chunked.Chunk{}
	var pack []chunked.SealedChunk
	var members []chunked.Chunk
	off := int64(16)
	flush := func() error {
		if len(pack) == 0 {
			return nil
		}
		var salt chunked.Salt
		if _, err := rand.Read(salt[:]); err != nil {
			return err
		}
		data, err := chunked.EncodePack(b.d.Domain, b.owner, salt, pack)
		if err != nil {
			return err
		}
		n := chunked.NameOf(data)
		if err := b.run.PutPack(b.ctx, n, data); err != nil {
			return err
		}
		b.packs[n] = int64(len(data))
		b.added += int64(len(data))
		for _, c := range members {
			c.At.Pack = n
			done[c.Digest] = c
		}
		pack, members, off = nil, nil, 16
		return nil
	}
	seen := map[chunked.Digest]bool{}
	for _, i := range fresh {
		p := block(blocks[i])
		c := chunked.Chunk{Digest: chunked.DigestOf(p), Size: len(p)}
		c.Key = b.d.ChunkKey(c.Digest)
		sealed := chunked.AppendSeal(nil, c.Key, chunked.TypeChunk, chunked.Stored, p)
		c.At.Sealed = len(sealed)
		if seen[c.Digest] {
			continue
		}
		seen[c.Digest] = true
		c.At.Offset = off
		off += int64(len(sealed))
		pack = append(pack, chunked.SealedChunk{ID: b.d.ID(c.Digest), Plain: c.Size, Sealed: sealed})
		members = append(members, c)
		if len(pack) == blocksOfPack {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	for _, i := range fresh {
		chunks[i] = done[chunked.DigestOf(block(blocks[i]))]
	}
	return nil
}

func (b *builder) segment(pos int64, chunks []chunked.Chunk) (chunked.SegmentRef, error) {
	seg := &chunked.Segment{}
	if _, err := rand.Read(seg.Salt[:]); err != nil {
		return chunked.SegmentRef{}, err
	}
	for i, c := range chunks {
		p := slices.Index(seg.Packs, c.At.Pack)
		k := slices.IndexFunc(seg.Chunks, func(x chunked.SegmentChunk) bool { return x.Digest == c.Digest })
		if k < 0 {
			if p < 0 {
				p = len(seg.Packs)
				seg.Packs = append(seg.Packs, c.At.Pack)
			}
			k = len(seg.Chunks)
			seg.Chunks = append(seg.Chunks, chunked.SegmentChunk{Digest: c.Digest, Key: c.Key, Offset: c.At.Offset, Size: blockSize, Sealed: int32(c.At.Sealed), Pack: uint32(p)})
		}
		seg.Extents = append(seg.Extents, chunked.SegmentExtent{Pos: int64(i) * blockSize, Length: blockSize, Chunk: uint32(k)})
	}
	length := int64(len(chunks)) * blockSize
	for _, o := range b.old {
		same := *seg
		same.Salt = o.seg.Salt
		if o.ref.Pos == pos && o.ref.Length == length && fmt.Sprintf("%+v", same) == fmt.Sprintf("%+v", *o.seg) {
			b.segments[o.ref.Name] = int64(o.ref.Stored)
			return o.ref, nil
		}
	}
	plain, err := seg.Encode(length)
	if err != nil {
		return chunked.SegmentRef{}, err
	}
	ref := chunked.SegmentRef{Pos: pos, Length: length, Key: b.d.SegmentKey(chunked.DigestOf(plain)), Plain: int32(len(plain))}
	data := chunked.AppendSeal(nil, ref.Key, chunked.TypeSegment, chunked.Stored, plain)
	ref.Name, ref.Stored = chunked.NameOf(data), int32(len(data))
	b.segments[ref.Name] = int64(len(data))
	return ref, b.run.PutIndex(b.ctx, ref.Name, data)
}

// read gives the disk of a version.
func read(ctx context.Context, s *images.Store, ref string) ([]byte, error) {
	img, err := s.Resolve(ctx, ref, images.ResolveOptions{})
	if err != nil {
		return nil, err
	}
	x, err := img.Open(ctx)
	if err != nil {
		return nil, err
	}
	st, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		return nil, err
	}
	b := make([]byte, st.Size())
	_, err = st.ReaderAt(ctx, 1<<20).ReadAt(b, 0)
	return b, err
}

// mustRead fails the test unless a version has these blocks.
func mustRead(t testing.TB, s *images.Store, ref string, blocks []string) {
	t.Helper()
	got, err := read(t.Context(), s, ref)
	if err != nil {
		t.Fatalf("reading %s: %v", ref, err)
	}
	if want := text(blocks); sha256.Sum256(got) != sha256.Sum256(want) {
		t.Fatalf("%s has other content: %d bytes, want %d", ref, len(got), len(want))
	}
}

func words(s string) []string { return strings.Fields(s) }
