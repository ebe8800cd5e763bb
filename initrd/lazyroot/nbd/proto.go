package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Numbers of the protocol
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
const (
	magicInit   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption = 0x49484156454f5054 // "IHAVEOPT"
	magicReply  = 0x0003e889045565a9 // to an option

	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10

	repAck          = 1
	repServer       = 2
	repInfo         = 3
	repMeta         = 4
	repErrUnsup     = 1<<31 + 1
	repErrInvalid   = 1<<31 + 3
	repErrUnknown   = 1<<31 + 6
	repErrTooBig    = 1<<31 + 9
	infoExport      = 0
	infoDescription = 2
	infoBlockSize   = 3

	// Transmission flags, as the kernel's attributes have them too.
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagCanMultiConn    = 1 << 8
	flagSendCache       = 1 << 10

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFUA    = 1 << 0
	cmdNoHole = 1 << 1
	cmdDF     = 1 << 2
	cmdReqOne = 1 << 3

	replyDone      = 1 << 0 // flag of a structured reply's last chunk
	chunkNone      = 0
	chunkData      = 1
	chunkStatus    = 5
	chunkError     = 1<<15 + 1
	stateHole      = 1 << 0
	stateZero      = 1 << 1
	requestSize    = 28
	metaAllocation = "base:allocation"
	metaID         = 1
)

// MaxRequest is the largest read or write, in bytes.
const MaxRequest = 32 << 20

// Limits of what a client may send.
const (
	maxOption  = 64 << 10
	maxName    = 4096
	maxOptions = 1000 // of one client
)

// request is what a client asks for in transmission.
type request struct {
	flags, command uint16
	cookie         uint64
	offset         uint64
	length         uint32
}

// errProtocol: the client does not speak the protocol, so that there is no
// telling where its next request begins.
var errProtocol = errors.New("the client breaks the NBD protocol")

func parseRequest(b *[requestSize]byte) (request, error) {
	if m := binary.BigEndian.Uint32(b[:]); m != magicRequest {
		return request{}, fmt.Errorf("%w: a request begins with %08x", errProtocol, m)
	}
	return request{
		flags: binary.BigEndian.Uint16(b[4:]), command: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]), length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// check tells what is wrong with a request of a device of size bytes: an errno
// of the protocol, 0 if nothing is.
func (r *request) check(size int64, readOnly, structured, allocation bool) unix.Errno {
	allowed := uint16(0)
	switch r.command {
	case cmdRead:
		if structured {
			allowed = cmdDF
		}
	case cmdWrite, cmdTrim:
		allowed = cmdFUA
	case cmdWriteZeroes:
		allowed = cmdFUA | cmdNoHole
	case cmdBlockStatus:
		allowed = cmdReqOne
		if !allocation {
			return unix.EINVAL
		}
	case cmdFlush, cmdCache:
	default:
		return unix.EINVAL
	}
	// A client that was told of FUA may set it where it means nothing.
	if r.flags&^(allowed|cmdFUA) != 0 {
		return unix.EINVAL
	}
	if r.command == cmdFlush {
		if r.offset != 0 || r.length != 0 {
			return unix.EINVAL
		}
		return 0
	}
	if readOnly && (r.command == cmdWrite || r.command == cmdTrim || r.command == cmdWriteZeroes) {
		return unix.EPERM
	}
	if (r.command == cmdRead || r.command == cmdWrite) && r.length > MaxRequest {
		return unix.EOVERFLOW
	}
	if r.offset > uint64(size) || uint64(r.length) > uint64(size)-r.offset {
		if r.command == cmdWrite || r.command == cmdWriteZeroes {
			return unix.ENOSPC
		}
		return unix.EINVAL
	}
	if r.length == 0 {
		return unix.EINVAL
	}
	return 0
}

func readFull(r io.Reader, n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}
