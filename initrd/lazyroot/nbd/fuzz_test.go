package nbd

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
)

// zeros is a device of zeros.
type zeros struct{ size int64 }

func (z zeros) Size() int64    { return z.size }
func (z zeros) ReadOnly() bool { return false }

func (z zeros) inside(off, n int64) error {
	if off < 0 || n < 0 || off > z.size-n {
		panic("a request beyond the device")
	}
	return nil
}

func (z zeros) ReadAt(_ context.Context, p []byte, off int64) error {
	return z.inside(off, int64(len(p)))
}

func (z zeros) WriteAt(_ context.Context, p []byte, off int64) error {
	return z.inside(off, int64(len(p)))
}
func (zeros) Flush(context.Context) error                     { return nil }
func (z zeros) Discard(_ context.Context, off, n int64) error { return z.inside(off, n) }

func (z zeros) WriteZeroes(_ context.Context, off, n int64) error { return z.inside(off, n) }

func (z zeros) NextZero(_ context.Context, _, to int64) (bool, int64, error) { return true, to, nil }

// FuzzServer has a client send anything: no request leaves the device, and the
// server ends when the client is gone.
func FuzzServer(f *testing.F) {
	hello := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	meta := append(binary.BigEndian.AppendUint32(make([]byte, 4), 1), append([]byte{0, 0, 0, 15}, metaAllocation...)...)
	begin := append(append(append([]byte(nil), hello...), option(optStructuredReply, nil)...), option(optSetMeta, meta)...)
	begin = append(begin, option(optGo, make([]byte, 6))...)
	for _, c := range []uint16{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes, cmdBlockStatus, cmdDisc, 77} {
		data := []byte(nil)
		if c == cmdWrite {
			data = make([]byte, 512)
		}
		f.Add(append(append([]byte(nil), begin...), encode(c, cmdFUA, 5, 512, 512, data)...))
		f.Add(append(append([]byte(nil), begin...), encode(c, 0, 5, 1<<63, 1<<31, data)...))
	}
	f.Add(append(append([]byte(nil), hello...), option(optExportName, []byte("x"))...))
	f.Add(append(append([]byte(nil), hello...), option(optList, nil)...))
	f.Add(append(append([]byte(nil), hello...), option(optInfo, []byte{0, 0, 0, 0, 0, 2, 0, 3, 0, 2})...))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, handshake := range []bool{true, false} {
			s, err := newServer(zeros{1 << 20}, Options{Name: "x", Memory: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			client, server := net.Pipe()
			var all sync.WaitGroup
			all.Go(func() { io.Copy(io.Discard, client) })
			all.Go(func() {
				client.Write(b)
				client.Close()
			})
			if handshake {
				s.client(t.Context(), server)
			} else {
				ServeTransmission(t.Context(), server, zeros{1 << 20}, Options{Memory: 1 << 20})
			}
			client.Close()
			all.Wait()
		}
	})
}
