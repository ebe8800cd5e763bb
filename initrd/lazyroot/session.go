package lazyroot

import (
	"crypto/hmac"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A session is a file in memory (a memfd, or one of a tmpfs) that has the bitmap
// as it is now, which survives its process but not the power: so it may tell
// of what was written and not flushed. It begins with a block:
//
//	0   16  magic
//	16  16  nonce of the disk's superblock
//	32  8   words that follow
//	64  32  HMAC-SHA-256 of bytes 0 to 63
const sessionMagic = "instar lazy bits"

// mapSession maps a session's words. fresh tells that they are not those of
// this disk's filling: all are zero then.
func mapSession(f *os.File, key, nonce []byte, words int) (w []uint64, unmap func() error, fresh bool, err error) {
	fail := func(err error) ([]uint64, func() error, bool, error) {
		return nil, nil, false, fmt.Errorf("the session's file: %w", err)
	}
	head := make([]byte, 96)
	copy(head, sessionMagic)
	copy(head[16:32], nonce)
	binary.LittleEndian.PutUint64(head[32:], uint64(words))
	copy(head[64:], mac(key, "instar lazy session\x00", head[:64]))
	size := int64(Block + 8*words)
	st, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	have := make([]byte, len(head))
	if st.Size() == size {
		if _, err := f.ReadAt(have, 0); err != nil {
			return fail(err)
		}
	}
	fresh = !hmac.Equal(have, head)
	if fresh {
		// Zeros first: a header over another's words would be believed.
		if err := f.Truncate(0); err != nil {
			return fail(err)
		}
		if err := f.Truncate(size); err != nil {
			return fail(err)
		}
		if _, err := f.WriteAt(head, 0); err != nil {
			return fail(err)
		}
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fail(err)
	}
	w = unsafe.Slice((*uint64)(unsafe.Pointer(&m[Block])), words)
	return w, func() error { return unix.Munmap(m) }, fresh, nil
}
