package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

// partition is a part of a disk, by its partition table.
type partition struct {
	Number        int   // from 1, as the kernel counts
	Start, Length int64 // bytes
	UUID, Label   string
}

// errNoTable: a disk holds no partition table that is known.
var errNoTable = errors.New("there is no MBR or GPT")

const diskSector = 512

// readPartitions reads the MBR or GPT of a disk of size bytes with sectors of
// 512 bytes. Logical partitions in an extended one are not supported.
func readPartitions(r io.ReaderAt, size int64) ([]partition, error) {
	b := make([]byte, 2*diskSector)
	if _, err := r.ReadAt(b, 0); err != nil {
		return nil, err
	}
	if b[510] != 0x55 || b[511] != 0xaa {
		return nil, errNoTable
	}
	var list []partition
	var err error
	if string(b[512:520]) == "EFI PART" {
		list, err = readGPT(r, b[512:])
	} else {
		list, err = readMBR(b)
	}
	if err != nil {
		return nil, err
	}
	for _, p := range list {
		if p.Start <= 0 || p.Length <= 0 || p.Start > size || p.Length > size-p.Start {
			return nil, fmt.Errorf("partition %d, %d bytes at %d, is not on the disk of %d", p.Number, p.Length, p.Start, size)
		}
	}
	if len(list) == 0 {
		return nil, errors.New("it has no partition")
	}
	return list, nil
}

func readMBR(b []byte) (list []partition, err error) {
	signature := binary.LittleEndian.Uint32(b[440:])
	for n := range 4 {
		e := b[446+16*n:]
		switch e[4] {
		case 0:
			continue
		case 0x05, 0x0f, 0x85:
			return nil, fmt.Errorf("partition %d is extended: logical partitions are not supported", n+1)
		}
		list = append(list, partition{
			Number: n + 1, Start: int64(binary.LittleEndian.Uint32(e[8:])) * diskSector, Length: int64(binary.LittleEndian.Uint32(e[12:])) * diskSector,
			UUID: fmt.Sprintf("%08x-%02x", signature, n+1),
		})
	}
	return list, nil
}

// readGPT reads the entries that a primary header names.
func readGPT(r io.ReaderAt, h []byte) (list []partition, err error) {
	size := binary.LittleEndian.Uint32(h[12:])
	if size < 92 || size > diskSector {
		return nil, fmt.Errorf("the GPT's header has %d bytes", size)
	}
	head := bytes.Clone(h[:size])
	clear(head[16:20])
	if crc32.ChecksumIEEE(head) != binary.LittleEndian.Uint32(h[16:]) {
		return nil, errors.New("the GPT's header has a wrong checksum")
	}
	at, count, entry := binary.LittleEndian.Uint64(h[72:]), binary.LittleEndian.Uint32(h[80:]), binary.LittleEndian.Uint32(h[84:])
	if count > 128 || entry < 128 || entry > 4096 || at > 1<<40 {
		return nil, fmt.Errorf("the GPT has %d entries of %d bytes at sector %d", count, entry, at)
	}
	table := make([]byte, count*entry)
	if _, err := r.ReadAt(table, int64(at)*diskSector); err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(table) != binary.LittleEndian.Uint32(h[88:]) {
		return nil, errors.New("the GPT's entries have a wrong checksum")
	}
	for n := range int(count) {
		e := table[n*int(entry):]
		if len(bytes.Trim(e[:16], "\x00")) == 0 {
			continue
		}
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if first > 1<<50 || last > 1<<50 || last < first {
			return nil, fmt.Errorf("partition %d is of sectors %d to %d", n+1, first, last)
		}
		list = append(list, partition{
			Number: n + 1, Start: int64(first) * diskSector, Length: int64(last-first+1) * diskSector,
			UUID: guid(e[16:32]), Label: utf16Text(e[56:128]),
		})
	}
	return list, nil
}

// guid writes a GUID as the kernel does.
func guid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]),
		binary.LittleEndian.Uint16(b[6:]), b[8:10], b[10:16])
}

func utf16Text(b []byte) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}
