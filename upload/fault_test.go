package upload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/s3fault"
	"github.com/instar-image/instar/upload/storetest"
)

// faultOptions shrinks the pauses, and the patience where the fault is silence:
// elsewhere a busy machine must not look like one.
func faultOptions(p *s3fault.Proxy, base upload.Options, op operation, f s3fault.Fault) upload.Options {
	base.Endpoint = p.URL
	base.Retry = upload.Retry{Attempts: 8, Base: time.Millisecond, Max: 4 * time.Millisecond}
	switch f {
	case s3fault.StallRequest, s3fault.StallReply, s3fault.StallBody, s3fault.Trickle:
		base.Timeouts = upload.Timeouts{Stall: 500 * time.Millisecond, Reply: time.Second, MinBytes: 64}
		if op.name == "stream" { // megabytes take a while
			base.Timeouts.Reply *= 3
		}
	}
	return base
}

// operation is something that may meet a fault at each of its requests.
type operation struct {
	name string
	// prepare runs without faults; run then meets them; check, without them
	// again, tells whether what run achieved is right (done: run returned
	// nil) or harmless (not done).
	prepare func(t *testing.T, s upload.Store)
	run     func(ctx context.Context, t *testing.T, s upload.Store) error
	check   func(t *testing.T, s upload.Store, done bool)
}

// same fails unless an object has the content, or, where that is allowed, is missing.
func same(t *testing.T, s upload.Store, key string, want []byte, mayMiss bool) {
	t.Helper()
	got, _, err := upload.GetBytes(t.Context(), s, key, 1<<30)
	if mayMiss && errors.Is(err, upload.ErrNotExist) {
		return
	}
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: got %d bytes, %v; want %d", key, len(got), err, len(want))
	}
}

func operations(t *testing.T) []operation {
	data := storetest.Bytes(1, 150_000)
	old := storetest.Bytes(2, 5_000)
	big := storetest.Bytes(3, 5<<20+1000)
	files, fetches := []upload.File{}, []upload.Fetch{}
	src := t.TempDir()
	for i := range 2 {
		name := fmt.Sprintf("img.part.%d", i)
		if err := os.WriteFile(filepath.Join(src, name), storetest.Bytes(uint64(i), 40_000+i), 0o644); err != nil {
			t.Fatal(err)
		}
		files = append(files, upload.File{Key: "b/" + name, Path: filepath.Join(src, name)})
		fetches = append(fetches, upload.Fetch{Key: "b/" + name, Name: name})
	}
	var dst string
	put := func(key string, b []byte) func(*testing.T, upload.Store) {
		return func(t *testing.T, s upload.Store) {
			if _, err := upload.PutBytes(t.Context(), s, key, b, upload.PutOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	uploadAll := func(t *testing.T, s upload.Store) {
		if _, err := upload.Upload(t.Context(), s, files, upload.TransferOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return []operation{
		{"put", nil, func(ctx context.Context, t *testing.T, s upload.Store) error {
			_, err := upload.PutBytes(ctx, s, "k", data, upload.PutOptions{})
			return err
		}, func(t *testing.T, s upload.Store, done bool) { same(t, s, "k", data, !done) }},

		{"put-new", nil, func(ctx context.Context, t *testing.T, s upload.Store) error {
			_, err := upload.PutBytes(ctx, s, "k", data, upload.PutOptions{IfNoneMatch: true})
			return err
		}, func(t *testing.T, s upload.Store, done bool) { same(t, s, "k", data, !done) }},

		{"put-exists", put("k", old), func(ctx context.Context, t *testing.T, s upload.Store) error {
			_, err := upload.PutBytes(ctx, s, "k", data, upload.PutOptions{IfNoneMatch: true})
			if err == nil {
				t.Error("put over what exists succeeded")
			}
			return err
		}, func(t *testing.T, s upload.Store, _ bool) { same(t, s, "k", old, false) }},

		{"stream", nil, func(ctx context.Context, t *testing.T, s upload.Store) error {
			_, err := s.PutStream(ctx, "k", bytes.NewReader(big), upload.PutOptions{PartSize: 5 << 20, Parallel: 2})
			return err
		}, func(t *testing.T, s upload.Store, done bool) { same(t, s, "k", big, !done) }},

		{"get", put("k", data), func(ctx context.Context, t *testing.T, s upload.Store) error {
			got, _, err := upload.GetBytes(ctx, s, "k", 1<<20)
			if err == nil && !bytes.Equal(got, data) {
				t.Errorf("got %d bytes, not those put", len(got))
			}
			return err
		}, nil},

		{"get-range", put("k", data), func(ctx context.Context, t *testing.T, s upload.Store) error {
			r, _, err := s.Get(ctx, "k", upload.GetOptions{Offset: 100, Length: 100_000})
			if err != nil {
				return err
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			if err == nil && len(got) != 100_000 {
				t.Errorf("got %d bytes", len(got))
			}
			return err
		}, nil},

		{"list", uploadAll, func(ctx context.Context, t *testing.T, s upload.Store) error {
			var got []string
			for o, err := range s.List(ctx, "b/") {
				if err != nil {
					return err
				}
				got = append(got, o.Key)
			}
			if len(got) != len(files) {
				t.Errorf("listed %q", got)
			}
			return nil
		}, nil},

		{"delete", uploadAll, func(ctx context.Context, t *testing.T, s upload.Store) error {
			return s.Delete(ctx, files[0].Key, "none")
		}, func(t *testing.T, s upload.Store, done bool) {
			n := 0
			for range s.List(t.Context(), "") {
				n++
			}
			if done && n != 1 || n < 1 {
				t.Errorf("%d objects are left", n)
			}
		}},

		{"copy", put("from", data), func(ctx context.Context, t *testing.T, s upload.Store) error {
			_, err := s.Copy(ctx, "to", "from", upload.PutOptions{})
			return err
		}, func(t *testing.T, s upload.Store, done bool) {
			same(t, s, "to", data, !done)
			same(t, s, "from", data, false)
		}},

		{"upload", nil, func(ctx context.Context, t *testing.T, s upload.Store) error {
			_, err := upload.Upload(ctx, s, files, upload.TransferOptions{Parallel: 2})
			return err
		}, func(t *testing.T, s upload.Store, done bool) {
			for i, f := range files {
				same(t, s, f.Key, storetest.Bytes(uint64(i), 40_000+i), !done)
			}
			if !done {
				uploadAll(t, s) // a rerun completes
			}
		}},

		{
			"download", func(t *testing.T, s upload.Store) { uploadAll(t, s); dst = t.TempDir() },
			func(ctx context.Context, t *testing.T, s upload.Store) error {
				_, err := upload.Download(ctx, s, dst, fetches, upload.TransferOptions{Parallel: 2})
				return err
			}, func(t *testing.T, s upload.Store, done bool) {
				for i, f := range fetches {
					got, err := os.ReadFile(filepath.Join(dst, f.Name))
					if errors.Is(err, os.ErrNotExist) && !done {
						continue
					}
					if want := storetest.Bytes(uint64(i), 40_000+i); !bytes.Equal(got, want) {
						t.Errorf("%s has %d bytes, %v", f.Name, len(got), err)
					}
				}
				if !done {
					if _, err := upload.Download(t.Context(), s, dst, fetches, upload.TransferOptions{}); err != nil {
						t.Errorf("rerun: %v", err)
					}
				}
			},
		},
	}
}

// everyFault lets every request of every operation go wrong in every way: for
// each it goes on to the next request until none is left to meet the fault.
func everyFault(t *testing.T, base upload.Options, faults []s3fault.Fault, ops ...string) {
	var runs, given atomic.Int32
	t.Run("", func(t *testing.T) {
		for _, op := range operations(t) {
			if len(ops) > 0 && !slices.Contains(ops, op.name) {
				continue
			}
			t.Run(op.name, func(t *testing.T) {
				t.Parallel()
				p := s3fault.New(base.Endpoint)
				t.Cleanup(p.Close)
				for _, f := range faults {
					for i := 0; ; i++ {
						log, err := once(t, p, base, op, i, f)
						if len(log) <= i {
							break // the operation is over before request i
						}
						runs.Add(1)
						if err != nil {
							given.Add(1)
						}
						if t.Failed() {
							t.Fatalf("with %s at request %d: %v\n%v", f, i, err, log)
						}
					}
				}
				if stray := p.Stray(); len(stray) > 0 {
					t.Errorf("redirects were followed: %q", stray)
				}
			})
		}
	})
	t.Logf("%d faults met, %d given up", runs.Load(), given.Load())
}

// once runs an operation with a fault at one request. What comes before and
// after has a store of its own, without a proxy and with patience.
func once(t *testing.T, p *s3fault.Proxy, base upload.Options, op operation, i int, f s3fault.Fault) ([]s3fault.Request, error) {
	s := bucket(t, base)
	defer s.Close()
	if op.prepare != nil {
		op.prepare(t, s)
	}
	p.Plan(s3fault.At(i, f))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	met := open(t, s.String(), faultOptions(p, base, op, f))
	defer met.Close()
	err := op.run(ctx, t, met)
	log := p.Log()
	if errors.Is(err, upload.ErrExist) && op.name == "put-exists" {
		err = nil
	}
	if err != nil {
		if len(log) <= i || !f.Permanent() {
			t.Errorf("given up: %v", err)
		}
		if strings.Contains(err.Error(), base.Credentials.SecretAccessKey) {
			t.Errorf("a secret is in %q", err)
		}
	}
	if len(log) > 60 {
		t.Errorf("%d requests", len(log))
	}
	if op.check != nil {
		op.check(t, s, err == nil)
	}
	if left := unfinished(t, base, s.(upload.BucketManager).Bucket()); len(left) > 0 {
		t.Errorf("multipart uploads are left: %q", left)
	}
	empty(t, s)
	return log, err
}

// empty removes all objects: the fake server keeps them in memory, and there
// are thousands of runs.
func empty(t *testing.T, s upload.Store) {
	t.Helper()
	var keys []string
	for o, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, o.Key)
	}
	if err := s.Delete(t.Context(), keys...); err != nil {
		t.Error(err)
	}
}

// unfinished lists a bucket's multipart uploads in progress.
func unfinished(t *testing.T, o upload.Options, bucket string) []string {
	t.Helper()
	c := sdk(o)
	// MinIO lists only by whole keys.
	var left []string
	for _, key := range []string{"", "pre/fix/k", "pre/fix/to"} {
		out, err := c.ListMultipartUploads(t.Context(), &s3.ListMultipartUploadsInput{Bucket: &bucket, Prefix: &key})
		if err != nil {
			if key == "" && strings.Contains(err.Error(), "NoSuchUpload") {
				return nil // gofakes3's word for none
			}
			t.Fatal(err)
		}
		for _, u := range out.Uploads {
			left = append(left, aws.ToString(u.Key))
		}
	}
	return left
}

// Faults whose requests do not reach the server, and damage to what it has no
// part in, are the same for all servers. These are about what a server does
// when it is asked again.
var asked = []s3fault.Fault{s3fault.LostReply, s3fault.ResetBody, s3fault.Shorter, s3fault.StallReply, s3fault.WrongETag, s3fault.MissingETag, s3fault.Applied500}

var repeated = []string{"put-new", "put-exists", "stream", "delete", "copy", "download"}

func TestFaultsFakeS3(t *testing.T) {
	t.Parallel()
	everyFault(t, fakeOptions(fakeS3(t)), s3fault.All())
}

func TestFaultsMinIO(t *testing.T) {
	t.Parallel()
	everyFault(t, serverOptions(servers.MinIO(t)), asked, repeated...)
}

func TestFaultsVersity(t *testing.T) {
	t.Parallel()
	everyFault(t, serverOptions(servers.Versity(t)), asked, repeated...)
}
