package filetree

import (
	"fmt"
	"math"
)

// chunked is an append-only sequence that never moves its elements, so that
// growing costs no copy and no second allocation of the same size.
type chunked[T any] struct {
	chunks [][]T
	n      int
}

const chunkLen = 1 << 13

func (c *chunked[T]) len() int { return c.n }

func (c *chunked[T]) at(i int) *T { return &c.chunks[i/chunkLen][i%chunkLen] }

func (c *chunked[T]) add(v T) {
	if c.n%chunkLen == 0 {
		c.chunks = append(c.chunks, make([]T, 0, chunkLen))
	}
	last := len(c.chunks) - 1
	c.chunks[last] = append(c.chunks[last], v)
	c.n++
}

// arena holds strings of up to 64 KiB end to end, none across two chunks.
type arena struct {
	chunks [][]byte
}

const arenaChunk = 1 << 18

func (a *arena) at(off, n uint32) []byte {
	c := a.chunks[off/arenaChunk]
	i := off % arenaChunk
	return c[i : i+n : i+n]
}

func (a *arena) add(s string) (uint32, error) {
	last := len(a.chunks) - 1
	if last < 0 || len(a.chunks[last])+len(s) > arenaChunk {
		if (last+2)*arenaChunk > math.MaxUint32 {
			return 0, fmt.Errorf("%w: more than 4 GiB of names", ErrTooLarge)
		}
		a.chunks = append(a.chunks, make([]byte, 0, arenaChunk))
		last++
	}
	off := uint32(last*arenaChunk + len(a.chunks[last]))
	a.chunks[last] = append(a.chunks[last], s...)
	return off, nil
}
