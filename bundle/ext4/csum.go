package ext4

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c is the kernel's: the register is neither inverted before nor after,
// so that checksums of pieces chain.
func crc32c(seed uint32, p []byte) uint32 { return ^crc32.Update(^seed, castagnoli, p) }

func crc32c32(seed, v uint32) uint32 {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	return crc32c(seed, b[:])
}

// inodeSeed starts the checksums of everything that belongs to one inode; the
// generation number, always 0 here, is part of it.
func (p *Plan) inodeSeed(ino uint32) uint32 {
	return crc32c32(crc32c32(p.seed, ino), 0)
}
