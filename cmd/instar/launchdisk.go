package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/instar-image/instar/bundle/sparse"
)

// copySparse copies a file, holes as holes.
func copySparse(ctx context.Context, from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return failf(exitFile, "copying the image: %w", err)
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	m, err := sparse.Scan(int(in.Fd()), st.Size())
	if err != nil {
		return fmt.Errorf("copying %s: %w", from, err)
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return failf(exitFile, "copying the image: %w", err)
	}
	defer out.Close()
	for _, e := range m {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, e.Off), io.NewSectionReader(in, e.Off, e.Len)); err != nil {
			return fmt.Errorf("copying %s: %w", from, err)
		}
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	return out.Close()
}
