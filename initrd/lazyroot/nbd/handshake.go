package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// session is what a client and the server agreed on.
type session struct {
	structured bool
	allocation bool // base:allocation was chosen
}

// errAborted: the client ended the handshake, as it may.
var errAborted = errors.New("the client went away in the handshake")

// handshake speaks the fixed newstyle handshake until transmission begins.
func (s *server) handshake(c net.Conn) (session, error) {
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[:], magicInit)
	binary.BigEndian.PutUint64(hello[8:], magicOption)
	binary.BigEndian.PutUint16(hello[16:], flagFixedNewstyle|flagNoZeroes)
	if _, err := c.Write(hello[:]); err != nil {
		return session{}, err
	}
	b, err := readFull(c, 4)
	if err != nil {
		return session{}, errAborted
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 || flags&flagFixedNewstyle == 0 {
		return session{}, fmt.Errorf("%w: its flags are %x", errProtocol, flags)
	}
	var agreed session
	for range maxOptions {
		b, err := readFull(c, 16)
		if err != nil {
			return session{}, errAborted
		}
		if m := binary.BigEndian.Uint64(b); m != magicOption {
			return session{}, fmt.Errorf("%w: an option begins with %016x", errProtocol, m)
		}
		option, size := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
		if size > maxOption {
			// Passed over, so that the next option is found.
			if _, err := io.CopyN(io.Discard, c, int64(size)); err != nil {
				return session{}, errAborted
			}
			if err := s.answer(c, option, repErrTooBig, nil); err != nil {
				return session{}, err
			}
			continue
		}
		data, err := readFull(c, int(size))
		if err != nil {
			return session{}, errAborted
		}
		switch option {
		case optAbort:
			s.answer(c, option, repAck, nil)
			return session{}, errAborted
		case optExportName:
			if !s.known(string(data)) {
				return session{}, fmt.Errorf("the client asks for export %q", clip(string(data)))
			}
			out := binary.BigEndian.AppendUint64(nil, uint64(s.dev.Size()))
			out = binary.BigEndian.AppendUint16(out, s.flags(agreed))
			if flags&flagNoZeroes == 0 {
				out = append(out, make([]byte, 124)...)
			}
			_, err := c.Write(out)
			return agreed, err
		}
		done, err := s.option(c, option, data, &agreed)
		if err != nil || done {
			return agreed, err
		}
	}
	return session{}, fmt.Errorf("%w: more than %d options", errProtocol, maxOptions)
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// known tells whether an export is the one there is: "" is the default.
func (s *server) known(name string) bool { return name == "" || name == s.o.Name }

func (s *server) answer(w io.Writer, option, reply uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, reply)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := w.Write(append(b, data...))
	return err
}

// option answers one option; done tells that transmission begins.
func (s *server) option(c io.Writer, option uint32, data []byte, agreed *session) (done bool, err error) {
	switch option {
	case optList:
		if len(data) != 0 {
			return false, s.answer(c, option, repErrInvalid, nil)
		}
		b := binary.BigEndian.AppendUint32(nil, uint32(len(s.o.Name)))
		if err := s.answer(c, option, repServer, append(b, s.o.Name...)); err != nil {
			return false, err
		}
		return false, s.answer(c, option, repAck, nil)
	case optStructuredReply:
		if len(data) != 0 {
			return false, s.answer(c, option, repErrInvalid, nil)
		}
		agreed.structured = true
		return false, s.answer(c, option, repAck, nil)
	case optInfo, optGo:
		return s.info(c, option, data, agreed)
	case optListMeta, optSetMeta:
		return false, s.meta(c, option, data, agreed)
	}
	return false, s.answer(c, option, repErrUnsup, nil)
}

// info answers INFO and GO: name, then which infos are wanted.
func (s *server) info(c io.Writer, option uint32, data []byte, agreed *session) (done bool, err error) {
	f := &fields{b: data}
	name := f.text()
	n := int(f.u16())
	var wanted []uint16
	for range n {
		wanted = append(wanted, f.u16())
		if f.bad {
			break
		}
	}
	if f.bad || len(f.b) > 0 || len(name) > maxName {
		return false, s.answer(c, option, repErrInvalid, nil)
	}
	if !s.known(name) {
		return false, s.answer(c, option, repErrUnknown, nil)
	}
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(s.dev.Size()))
	b = binary.BigEndian.AppendUint16(b, s.flags(*agreed))
	if err := s.answer(c, option, repInfo, b); err != nil {
		return false, err
	}
	for _, w := range wanted {
		switch w {
		case infoBlockSize:
			b := binary.BigEndian.AppendUint16(nil, infoBlockSize)
			b = binary.BigEndian.AppendUint32(b, 1)
			b = binary.BigEndian.AppendUint32(b, 4096)
			b = binary.BigEndian.AppendUint32(b, MaxRequest)
			if err := s.answer(c, option, repInfo, b); err != nil {
				return false, err
			}
		case infoDescription:
			if s.o.Description == "" {
				continue
			}
			b := binary.BigEndian.AppendUint16(nil, infoDescription)
			if err := s.answer(c, option, repInfo, append(b, s.o.Description...)); err != nil {
				return false, err
			}
		}
	}
	return option == optGo, s.answer(c, option, repAck, nil)
}

// meta answers which metadata contexts there are: one.
func (s *server) meta(c io.Writer, option uint32, data []byte, agreed *session) error {
	f := &fields{b: data}
	name := f.text()
	n := int(f.u32())
	match := option == optListMeta && n == 0
	for range n {
		q := f.text()
		match = match || q == metaAllocation || option == optListMeta && q == "base:"
		if f.bad {
			break
		}
	}
	if option == optSetMeta {
		agreed.allocation = false
	}
	if f.bad || len(f.b) > 0 || len(name) > maxName || !agreed.structured {
		return s.answer(c, option, repErrInvalid, nil)
	}
	if !s.known(name) {
		return s.answer(c, option, repErrUnknown, nil)
	}
	if _, ok := s.dev.(Mapper); match && ok {
		id := uint32(0)
		if option == optSetMeta {
			id, agreed.allocation = metaID, true
		}
		b := binary.BigEndian.AppendUint32(nil, id)
		if err := s.answer(c, option, repMeta, append(b, metaAllocation...)); err != nil {
			return err
		}
	}
	return s.answer(c, option, repAck, nil)
}

// fields reads an option's data.
type fields struct {
	b   []byte
	bad bool
}

func (f *fields) take(n uint32) []byte {
	if f.bad || uint64(n) > uint64(len(f.b)) {
		f.bad = true
		return make([]byte, min(n, 8))
	}
	p := f.b[:n]
	f.b = f.b[n:]
	return p
}

func (f *fields) u16() uint16 { return binary.BigEndian.Uint16(f.take(2)) }

func (f *fields) u32() uint32 { return binary.BigEndian.Uint32(f.take(4)) }

func (f *fields) text() string { return strings.Clone(string(f.take(f.u32()))) }
