package ec2

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// nowhere is an Output for who only wants to verify.
type nowhere struct{ n int64 }

func (o *nowhere) Write(p []byte) (int, error) { o.n += int64(len(p)); return len(p), nil }
func (o *nowhere) Skip(n int64) error          { o.n += n; return nil }
func (o *nowhere) Finish() (int64, error)      { return o.n, nil }

var zeros [64 << 10]byte

// writeZeros writes n zeros to w.
func writeZeros(w io.Writer, n int64) error {
	for n > 0 {
		k, err := w.Write(zeros[:min(n, int64(len(zeros)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

type streamOutput struct {
	w io.Writer
	n int64
}

// NewStreamOutput returns an [Output] that writes everything, zeros too, to w
// in order.
func NewStreamOutput(w io.Writer) Output { return &streamOutput{w: w} }

func (o *streamOutput) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	o.n += int64(n)
	return n, err
}

func (o *streamOutput) Skip(n int64) error { return writeZeros(o, n) }

func (o *streamOutput) Finish() (int64, error) { return o.n, nil }

type deviceOutput struct {
	f  *os.File
	at int64
}

// NewDeviceOutput returns an [Output] that overwrites f from its beginning.
// Runs of zeros are made by the kernel where it can (BLKZEROOUT and the like
// through fallocate), else written.
func NewDeviceOutput(f *os.File) Output { return &deviceOutput{f: f} }

func (o *deviceOutput) Write(p []byte) (int, error) {
	n, err := o.f.WriteAt(p, o.at)
	o.at += int64(n)
	return n, err
}

func (o *deviceOutput) Skip(n int64) error {
	// Whole logical blocks only; the ends of a run are written.
	const block = 4096
	if lead := (block - o.at%block) % block; lead > 0 {
		if err := writeZeros(o, min(lead, n)); err != nil {
			return err
		}
		n -= min(lead, n)
	}
	if whole := n / block * block; whole > 0 {
		if unix.Fallocate(int(o.f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, o.at, whole) == nil {
			o.at += whole
			n -= whole
		}
	}
	return writeZeros(o, n)
}

// Finish sets the size where f is a regular file and larger or smaller.
func (o *deviceOutput) Finish() (int64, error) {
	if st, err := o.f.Stat(); err == nil && st.Mode().IsRegular() {
		if err := o.f.Truncate(o.at); err != nil {
			return o.at, fmt.Errorf("setting the size: %w", err)
		}
	}
	return o.at, nil
}
