package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
)

// scale captures trees of 1, 4 and 16 GiB, and one with a sparse file of a TiB:
// time is to grow with the data, memory not.
func (b *bencher) scale() ([]row, error) {
	tree := filepath.Join(b.work, "large")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return nil, err
	}
	create := func(name, size string) (cost, error) {
		return b.bash(toolEnv + b.instar + ` create-image --store $W/scale --name ` + name + ` -v $W/large --no-filter --quiet --size ` + size)
	}
	var costs []cost
	have := 0
	for _, gib := range []int{1, 4, 16} {
		if err := fillLarge(tree, have, gib); err != nil {
			return nil, err
		}
		have = gib
		if _, err := b.bash(`rm -rf $W/scale $W/images; sync; sleep 3`); err != nil {
			return nil, err
		}
		c, err := create(fmt.Sprintf("gib-%d", gib), "64g")
		if err != nil {
			return nil, err
		}
		costs = append(costs, c)
	}
	again, err := create("gib-16", "64g")
	if err != nil {
		return nil, err
	}
	if _, err := b.bash(`rm -rf $W/scale $W/images`); err != nil {
		return nil, err
	}
	if err := sparseTiB(filepath.Join(tree, "sparse")); err != nil {
		return nil, err
	}
	tib, err := create("tib", "1t")
	if err != nil {
		return nil, err
	}
	rss := func(what string, c cost) row { return row{what, size(c.rss), "", float64(c.rss) / mib, 200, "MiB"} }
	return []row{
		{"create-image of 16 GiB: CPU, against 16 times that of 1 GiB", costs[2].String(), costs[0].String(), costs[2].cpu / costs[0].cpu / 16, 1.15, "x"},
		{"  of 4 GiB, against 4 times that of 1 GiB", costs[1].String(), costs[0].String(), costs[1].cpu / costs[0].cpu / 4, 1.15, "x"},
		rss("  peak memory, 1 GiB", costs[0]), rss("  4 GiB", costs[1]), rss("  16 GiB", costs[2]),
		{"  16 GiB unchanged: CPU, against the first time", again.String(), costs[2].String(), again.cpu / costs[2].cpu, 0.05, "x"},
		rss("  a disk of 1 TiB, 16 GiB of it and a sparse file with 100,000 pieces full: peak memory", tib),
	}, nil
}

// fillLarge makes a tree of from GiB one of to GiB: files of 4 MiB and of 16
// KiB that compress to about a third, none like another.
func fillLarge(dir string, from, to int) error {
	text := bytes.Repeat([]byte("The quick brown fox jumps over the lazy dog. "), 4000)
	r := rand.New(rand.NewPCG(1, uint64(from)))
	block := func(p []byte) {
		copy(p, text[r.IntN(1000):])
		for i := 0; i+8 <= len(p)/4; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
	}
	for gib := from; gib < to; gib++ {
		sub := filepath.Join(dir, fmt.Sprintf("gib-%02d", gib))
		if err := os.Mkdir(sub, 0o755); err != nil {
			return err
		}
		buf := make([]byte, 4*mib)
		for i := range 240 {
			for off := 0; off < len(buf); off += 64 << 10 {
				block(buf[off : off+64<<10])
			}
			if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("large-%03d", i)), buf, 0o644); err != nil {
				return err
			}
		}
		for i := range 4096 {
			block(buf[:16<<10])
			if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("small-%04d", i)), buf[:16<<10], 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// sparseTiB makes a file of a TiB with 100,000 pieces of data.
func sparseTiB(file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	const tib, pieces = 1 << 40, 100_000
	if err := f.Truncate(tib); err != nil {
		return err
	}
	p := make([]byte, 4096)
	copy(p, strings.Repeat("a piece of a sparse file ", 200))
	for i := range int64(pieces) {
		binary.LittleEndian.PutUint64(p, uint64(i))
		if _, err := f.WriteAt(p, i*(tib/pieces)&^4095); err != nil {
			return err
		}
	}
	return nil
}
