package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// known is the chunks that packs in the store hold, by the first half of their
// IDs: 36 bytes a chunk, of which a full TiB has a million and a half. The half
// is as good as the whole against chance, and against whoever does not have the
// domain's secret.
type known struct {
	packs []chunked.Name
	at    map[[16]byte]packed
}

type packed struct{ pack, offset, sealed uint32 }

// Lookup tells where a chunk is.
func (k *known) Lookup(id chunked.ID) (chunked.Location, bool) {
	p, ok := k.at[[16]byte(id[:16])]
	if !ok {
		return chunked.Location{}, false
	}
	return chunked.Location{Pack: k.packs[p.pack], Offset: int64(p.offset), Sealed: int(p.sealed)}, true
}

// Len is the number of chunks.
func (k *known) Len() int { return len(k.at) }

// add takes a pack's footer in. The first pack with a chunk has it.
func (k *known) add(n chunked.Name, f *chunked.Footer) {
	if k.at == nil {
		k.at = map[[16]byte]packed{}
	}
	k.packs = append(k.packs, n)
	for e, at := range f.All(n) {
		half := [16]byte(e.ID[:16])
		if _, ok := k.at[half]; !ok {
			k.at[half] = packed{uint32(len(k.packs) - 1), uint32(at.Offset), uint32(e.Sealed)}
		}
	}
}

// Known is the chunks of the run's own packs (all creators' with
// [RunOptions.AllCreators]) that were there when the run began and are not
// condemned. What is remembered of a pack counts only if the pack was listed.
func (r *Run) Known(ctx context.Context) (chunked.Known, error) {
	var packs []chunked.ObjectSize
	for _, key := range sortedKeys(r.start.objects) {
		n, err := chunked.ParseFanned(chunked.PacksFolder, key)
		if err != nil || !r.start.has(key) {
			continue
		}
		packs = append(packs, chunked.ObjectSize{Name: n, Size: r.start.objects[key].Size})
	}
	cache := r.s.memory.footers(r.opt.Domain.Label())
	cache.prune(packs)
	footers := make([]*chunked.Footer, len(packs))
	index := make([]int, len(packs))
	for i := range index {
		index[i] = i
	}
	err := each(ctx, r.s.opt.Parallel, index, func(ctx context.Context, i int) error {
		f, err := r.s.footer(ctx, r.opt.Domain.Domain, cache, packs[i])
		switch {
		case err == nil:
			if r.opt.AllCreators || f.OwnedBy(r.opt.Owner) {
				footers[i] = f
			}
			return nil
		case errors.Is(err, chunked.ErrForeign), errors.Is(err, chunked.ErrCorrupt), errors.Is(err, chunked.ErrFormat),
			errors.Is(err, chunked.ErrVersion), errors.Is(err, chunked.ErrMissing):
			return nil // no source of chunks; verify says what is wrong with it
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find out which chunks are stored: %w", err)
	}
	// A footer is its creator's word, but not about the bytes in front of it: who
	// may write packs can put a copy of it behind others. The salt tells copies.
	salts := map[chunked.Salt]int{}
	for _, f := range footers {
		if f != nil {
			salts[f.Salt]++
		}
	}
	k := &known{}
	for i, f := range footers {
		if f != nil && salts[f.Salt] == 1 {
			k.add(packs[i].Name, f)
		}
	}
	return k, nil
}

// footer reads a pack's footer, from the cache if it is there.
func (s *Store) footer(ctx context.Context, d *chunked.Domain, cache *footerCache, p chunked.ObjectSize) (*chunked.Footer, error) {
	if c := cache.open(p); c != nil {
		f, err := d.ReadFooter(ctx, c, p.Name, p.Size)
		if err == nil || errors.Is(err, chunked.ErrForeign) {
			return f, err
		}
	}
	rec := &recorder{source: &source{s: s}, size: p.Size}
	f, err := d.ReadFooter(ctx, rec, p.Name, p.Size)
	if err == nil || errors.Is(err, chunked.ErrForeign) {
		cache.save(p, rec.tail)
	}
	return f, err
}

// recorder keeps the end of a pack that ReadFooter reads.
type recorder struct {
	*source
	size int64
	tail []byte
}

func (r *recorder) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	if err := r.source.ReadPack(ctx, n, off, p); err != nil {
		return err
	}
	switch have := r.size - int64(len(r.tail)); {
	case off+int64(len(p)) == r.size:
		r.tail = append([]byte(nil), p...)
	case off < have && off+int64(len(p)) >= have:
		r.tail = append(append([]byte(nil), p[:have-off]...), r.tail...)
	}
	return nil
}

// footerCache keeps the ends of packs as they are stored, one file for each,
// below memory's directory. A file is believed if its checksum binds it to
// the pack's name; its content is sealed like the pack's. It says what a pack
// holds, never that the pack exists.
type footerCache struct {
	dir string // "" keeps nothing
	mu  sync.Mutex
	hh  map[string]bool // directories made
}

func (m *memory) footers(l chunked.Label) *footerCache {
	if m.dir == "" {
		return &footerCache{}
	}
	return &footerCache{dir: filepath.Join(m.dir, "footers", l.String()), hh: map[string]bool{}}
}

// maxTail is how long an end of a pack may be to be kept.
const maxTail = 17 << 20

func (c *footerCache) file(n chunked.Name) string {
	s := n.String()
	return filepath.Join(c.dir, s[:2], s[2:])
}

func (c *footerCache) open(p chunked.ObjectSize) *cached {
	if c.dir == "" {
		return nil
	}
	b, err := os.ReadFile(c.file(p.Name))
	if err != nil || len(b) < sha256.Size || int64(len(b)) > p.Size+sha256.Size {
		return nil
	}
	tail := b[sha256.Size:]
	if sum := tailSum(p, tail); string(sum[:]) != string(b[:sha256.Size]) {
		return nil
	}
	return &cached{name: p.Name, from: p.Size - int64(len(tail)), tail: tail}
}

func tailSum(p chunked.ObjectSize, tail []byte) [32]byte {
	return sha256.Sum256(fmt.Appendf(nil, "%s %d %s", p.Name, p.Size, tail))
}

// save keeps an end. It may fail: the next run reads it from the store again.
func (c *footerCache) save(p chunked.ObjectSize, tail []byte) {
	if c.dir == "" || len(tail) == 0 || len(tail) > maxTail {
		return
	}
	name := c.file(p.Name)
	dir := filepath.Dir(name)
	c.mu.Lock()
	if !c.hh[dir] {
		c.hh[dir] = os.MkdirAll(dir, 0o700) == nil
	}
	c.mu.Unlock()
	f, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return
	}
	sum := tailSum(p, tail)
	_, err = f.Write(append(sum[:], tail...))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
}

// prune removes what is kept of packs that are gone, and temporary files.
func (c *footerCache) prune(packs []chunked.ObjectSize) {
	if c.dir == "" {
		return
	}
	there := make(map[chunked.Name]bool, len(packs))
	for _, p := range packs {
		there[p.Name] = true
	}
	dirs, err := os.ReadDir(c.dir)
	if err != nil {
		return
	}
	for _, d := range dirs {
		files, err := os.ReadDir(filepath.Join(c.dir, d.Name()))
		if err != nil {
			continue
		}
		for _, f := range files {
			b, err := hex.DecodeString(d.Name() + f.Name())
			temporary := strings.HasPrefix(f.Name(), ".new-")
			if !temporary && err == nil && len(b) == 32 && there[chunked.Name(b)] {
				continue
			}
			os.Remove(filepath.Join(c.dir, d.Name(), f.Name()))
		}
	}
}

// cached reads the end of a pack that is kept.
type cached struct {
	name chunked.Name
	from int64
	tail []byte
}

func (c *cached) ReadPack(_ context.Context, n chunked.Name, off int64, p []byte) error {
	at := off - c.from
	if n != c.name || at < 0 || at+int64(len(p)) > int64(len(c.tail)) {
		return fmt.Errorf("%w: only the end of the pack is kept", upload.ErrNotExist)
	}
	copy(p, c.tail[at:])
	return nil
}
