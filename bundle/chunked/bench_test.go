package chunked

import (
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// programs gives n bytes that compress by about two thirds, as a system's do.
func programs(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := make([][]byte, 4000)
	for i := range words {
		words[i] = text(r, 3+r.IntN(12))
	}
	p := make([]byte, 0, n+32)
	for len(p) < n {
		p = append(p, words[int(r.ExpFloat64()*400)%len(words)]...)
		if r.IntN(4) == 0 {
			p = append(p, byte(r.Uint32()), byte(r.Uint32()))
		}
	}
	return p[:n]
}

func noise(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// BenchmarkWriter writes 64 MiB of new chunks a round: digest, zstd, seal,
// packs and their names.
func BenchmarkWriter(b *testing.B) {
	for _, data := range []struct {
		name string
		p    []byte
	}{{"programs", programs(1, 64<<20)}, {"noise", noise(1, 64<<20)}} {
		for level, name := range []string{"fastest", "default", "better"} {
			b.Run(data.name+"/"+name, func(b *testing.B) {
				b.SetBytes(int64(len(data.p)))
				var sealed int64
				for b.Loop() {
					w, err := NewWriter(b.Context(), WriterOptions{Domain: testDomain(1), Sink: &discard{}, Level: Level(level)})
					check(b, err)
					s, err := w.Stream("disk", int64(len(data.p)))
					check(b, err)
					for i := 0; i < len(data.p); i += cellSize {
						check(b, s.Map(int64(i), cellSize, w.Add(data.p[i:i+cellSize], nil), 0))
					}
					res, err := w.Finish(b.Context())
					check(b, err)
					sealed = res.Counters.Sealed
					w.Close()
				}
				b.ReportMetric(float64(sealed)/float64(len(data.p)), "ratio")
			})
		}
	}
}

func benchImage(b *testing.B, n int) (*memoryStore, *written) {
	b.Helper()
	m := newMemoryStore()
	w, err := NewWriter(b.Context(), WriterOptions{Domain: testDomain(1), Sink: m})
	check(b, err)
	defer w.Close()
	p := programs(1, n)
	s, err := w.Stream("disk", int64(n))
	check(b, err)
	for i := 0; i < n; i += cellSize {
		check(b, s.Map(int64(i), cellSize, w.Add(p[i:i+cellSize], nil), 0))
	}
	res, err := w.Finish(b.Context())
	check(b, err)
	return m, openResult(b, m, res)
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// BenchmarkRestore reads 64 MiB a round: tag, zstd, digest.
func BenchmarkRestore(b *testing.B) {
	_, w := benchImage(b, 64<<20)
	b.SetBytes(64 << 20)
	for b.Loop() {
		check(b, Restore(b.Context(), w.s, nowhere{}, RestoreOptions{}))
	}
}

// BenchmarkReadAt reads 4 KiB at random, of chunks that are kept.
func BenchmarkReadAt(b *testing.B) {
	_, w := benchImage(b, 16<<20)
	at := w.s.ReaderAt(b.Context(), 32<<20)
	_, err := io.Copy(io.Discard, io.NewSectionReader(at, 0, 16<<20))
	check(b, err)
	r := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 4096)
	b.SetBytes(4096)
	for b.Loop() {
		_, err := at.ReadAt(p, r.Int64N(4095)*4096)
		check(b, err)
	}
}

// BenchmarkSegment encodes and decodes what is said of 256 MiB in chunks of
// 512 KiB, and in the worst case: a chunk for each block.
func BenchmarkSegment(b *testing.B) {
	for _, n := range []int{512, 65536} {
		s := &Segment{Packs: []Name{{1}}}
		size := int32(segmentRange / n)
		for i := range n {
			s.Chunks = append(s.Chunks, SegmentChunk{Digest: Digest{byte(i), byte(i >> 8), byte(i >> 16)}, Offset: 16 + 40*int64(i), Size: size, Sealed: 40})
			s.Extents = append(s.Extents, SegmentExtent{Pos: int64(i) * int64(size), Length: size, Chunk: uint32(i)})
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				p, err := s.Encode(segmentRange)
				check(b, err)
				_, err = DecodeSegment(p, segmentRange)
				check(b, err)
			}
		})
	}
}
