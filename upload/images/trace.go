package images

import (
	"cmp"
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// ErrNoTrace says that nobody recorded what a boot of the image reads.
var ErrNoTrace = errors.New("the image has no boot trace")

// maxTrace is the most bytes of a trace object.
const maxTrace = chunked.MaxTrace + keys.MaxSignature

// Trace is a boot trace that is verified.
type Trace struct {
	*chunked.Trace
	Size   int64 // of the object, bytes
	Signer ssh.PublicKey
	// Bytes of the disk that its ranges name, each once; what lies outside the
	// disk is not counted.
	Bytes int64
}

// PutTrace signs and stores what a boot of the image reads first, in place of
// what was known before. Ranges that lie outside the disk are left out, and so
// is what was named before, and what comes after the 262,144th.
func (i *Image) PutTrace(ctx context.Context, ranges []chunked.Range, signer keys.Signer) (*Trace, error) {
	fail := func(err error) (*Trace, error) {
		return nil, fmt.Errorf("store a boot trace of image %s: %w", i.ref(), err)
	}
	doc := &chunked.Trace{Name: i.Manifest.Name, Manifest: i.Name, Created: i.s.stamp(), Ranges: FirstReads(ranges, i.diskSize())}
	if len(doc.Ranges) == 0 {
		return fail(errors.New("nothing of the disk was read"))
	}
	object, err := doc.Sign(ctx, signer)
	if err != nil {
		return fail(err)
	}
	if i.s.opt.Trust == nil {
		return fail(ErrNoTrust)
	}
	// A signature that readers will not take is found out now.
	t, v, err := chunked.OpenTrace(object, i.s.opt.Trust, i.Manifest.Name, i.Name)
	if err != nil {
		return fail(fmt.Errorf("the signing key is not one this machine trusts for the image: %w", err))
	}
	if _, err := upload.PutBytes(ctx, i.s.objects, chunked.TraceKey(i.Manifest.Name, i.Name), object, upload.PutOptions{}); err != nil {
		return fail(err)
	}
	return &Trace{t, int64(len(object)), v.Key, covered(t.Ranges)}, nil
}

// TraceObject is the image's boot trace as it is stored, not verified:
// [ErrNoTrace] if there is none.
func (i *Image) TraceObject(ctx context.Context) ([]byte, error) {
	b, _, err := i.s.get(ctx, chunked.TraceKey(i.Manifest.Name, i.Name), maxTrace)
	if errors.Is(err, upload.ErrNotExist) {
		err = ErrNoTrace
	}
	if err != nil {
		return nil, fmt.Errorf("boot trace of image %s: %w", i.ref(), err)
	}
	return b, nil
}

// Trace reads and verifies the image's boot trace: [ErrNoTrace] if there is
// none. It is only ever a hint: whoever boots does so without one, too.
func (i *Image) Trace(ctx context.Context) (*Trace, error) {
	b, err := i.TraceObject(ctx)
	if err != nil {
		return nil, err
	}
	if i.s.opt.Trust == nil {
		return nil, ErrNoTrust
	}
	t, v, err := chunked.OpenTrace(b, i.s.opt.Trust, i.Manifest.Name, i.Name)
	if err != nil {
		return nil, fmt.Errorf("boot trace of image %s: %w", i.ref(), err)
	}
	return &Trace{t, int64(len(b)), v.Key, covered(FirstReads(t.Ranges, i.diskSize()))}, nil
}

// DeleteTrace removes the image's boot trace, if there is one.
func (i *Image) DeleteTrace(ctx context.Context) error {
	if err := i.s.objects.Delete(ctx, chunked.TraceKey(i.Manifest.Name, i.Name)); err != nil {
		return fmt.Errorf("delete the boot trace of image %s: %w", i.ref(), err)
	}
	return nil
}

func (i *Image) diskSize() int64 {
	for _, s := range i.Manifest.Streams {
		if s.Name == chunked.StreamDisk {
			return s.Size
		}
	}
	return 0
}

// FirstReads gives what ranges name of a disk of size bytes, in their order and
// each byte once; ranges that go on where the one before ends are joined. There
// are at most chunked.MaxRanges.
func FirstReads(ranges []chunked.Range, size int64) []chunked.Range {
	// All borders cut the disk into pieces; the first range to name one has it.
	var list []piece
	for n, r := range ranges {
		if r.Position < 0 || r.Length < 1 || r.Position >= size {
			continue
		}
		list = append(list, piece{r.Position, r.Position + min(r.Length, size-r.Position), n})
	}
	slices.SortFunc(list, func(a, b piece) int { return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.rank, b.rank)) })
	var out []piece
	var open piecesByRank // those that begin before at
	at := int64(0)
	for i := 0; i < len(list) || len(open) > 0; {
		if len(open) == 0 {
			at = list[i].from
		}
		for ; i < len(list) && list[i].from <= at; i++ {
			heap.Push(&open, list[i])
		}
		first := open[0]
		if first.to <= at {
			heap.Pop(&open)
			continue
		}
		to := first.to
		if i < len(list) {
			to = min(to, list[i].from)
		}
		if n := len(out); n > 0 && out[n-1].rank == first.rank && out[n-1].to == at {
			out[n-1].to = to
		} else {
			out = append(out, piece{at, to, first.rank})
		}
		at = to
	}
	slices.SortStableFunc(out, func(a, b piece) int { return cmp.Compare(a.rank, b.rank) })
	reads := make([]chunked.Range, 0, min(len(out), chunked.MaxRanges))
	for _, p := range out {
		if n := len(reads); n > 0 && reads[n-1].Position+reads[n-1].Length == p.from {
			reads[n-1].Length += p.to - p.from
			continue
		}
		if len(reads) == chunked.MaxRanges {
			break
		}
		reads = append(reads, chunked.Range{Position: p.from, Length: p.to - p.from})
	}
	return reads
}

// piece is a part of the disk, and the number of the range that names it.
type piece struct {
	from, to int64
	rank     int
}

// piecesByRank is a heap.
type piecesByRank []piece

func (h piecesByRank) Len() int           { return len(h) }
func (h piecesByRank) Less(i, j int) bool { return h[i].rank < h[j].rank }
func (h piecesByRank) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *piecesByRank) Push(x any)        { *h = append(*h, x.(piece)) }
func (h *piecesByRank) Pop() any {
	n := len(*h) - 1
	x := (*h)[n]
	*h = (*h)[:n]
	return x
}

// covered counts the bytes of ranges that do not overlap.
func covered(ranges []chunked.Range) (n int64) {
	for _, r := range ranges {
		n += r.Length
	}
	return n
}

// ReadRanges reads what a guest recorded of its boot: JSON,
// {"ranges": [[position, length], …]}, of at most 32 MiB. It is anybody's word
// until it is signed.
func ReadRanges(r io.Reader) ([]chunked.Range, error) {
	b, err := io.ReadAll(io.LimitReader(r, chunked.MaxTrace+1))
	if err != nil {
		return nil, fmt.Errorf("read a boot's recorded reads: %w", err)
	}
	if len(b) > chunked.MaxTrace {
		return nil, fmt.Errorf("%w: recorded reads of more than %d bytes", chunked.ErrFormat, chunked.MaxTrace)
	}
	var doc struct {
		Ranges [][]int64 `json:"ranges"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%w: recorded reads: %w", chunked.ErrFormat, err)
	}
	ranges := make([]chunked.Range, len(doc.Ranges))
	for i, x := range doc.Ranges {
		if len(x) != 2 {
			return nil, fmt.Errorf("%w: recorded reads: number %d is not [position, length]", chunked.ErrFormat, i)
		}
		ranges[i] = chunked.Range{Position: x[0], Length: x[1]}
	}
	return ranges, nil
}
