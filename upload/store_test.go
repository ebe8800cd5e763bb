package upload_test

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"flag"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"go.uber.org/goleak"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/storetest"
)

// TestMain lets many tests wait at a time: most of them wait for timeouts. The
// machine's own AWS configuration is out of the game.
func TestMain(m *testing.M) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "AWS_") {
			os.Unsetenv(name)
		}
	}
	flag.Parse()
	flag.Set("test.parallel", "16")
	goleak.VerifyTestMain(m)
}

// quick repeats without the pauses an operator's network needs.
var quick = upload.Retry{Attempts: 4, Base: time.Millisecond, Max: 5 * time.Millisecond}

// fakeS3 starts an in-process server and returns its endpoint.
func fakeS3(t testing.TB) string {
	srv := httptest.NewServer(gofakes3.New(s3mem.New()).Server())
	t.Cleanup(srv.Close)
	return srv.URL
}

func open(t testing.TB, url string, o upload.Options) upload.Store {
	t.Helper()
	s, err := upload.Open(context.Background(), url, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// bucket makes a new bucket on a server and opens a prefix of it.
func bucket(t testing.TB, o upload.Options) upload.Store {
	t.Helper()
	s := open(t, fmt.Sprintf("s3://test-%d/pre/fix", bucketNumber.Add(1)), o)
	if err := s.(upload.BucketManager).CreateBucket(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	return s
}

var bucketNumber atomic.Int64

func fakeOptions(endpoint string) upload.Options {
	return upload.Options{
		Endpoint: endpoint, Region: "us-east-1", Retry: quick,
		Credentials: &upload.Credentials{AccessKeyID: "AKIATEST", SecretAccessKey: "not-so-secret"},
	}
}

func serverOptions(s *servers.Server) upload.Options {
	return upload.Options{
		Endpoint: s.Endpoint, Region: s.Region, CACertFile: s.CACert, Retry: quick,
		Credentials: &upload.Credentials{AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey},
	}
}

func TestDir(t *testing.T) {
	storetest.Run(t, func(t *testing.T) upload.Store { return open(t, t.TempDir(), upload.Options{}) }, storetest.Options{})
}

func TestFakeS3(t *testing.T) {
	e := fakeS3(t)
	storetest.Run(t, func(t *testing.T) upload.Store { return bucket(t, fakeOptions(e)) }, storetest.Options{})
}

func TestMinIO(t *testing.T) {
	o := serverOptions(servers.MinIO(t))
	storetest.Run(t, func(t *testing.T) upload.Store { return bucket(t, o) }, storetest.Options{})
}

func TestMinIOTLS(t *testing.T) {
	o := serverOptions(servers.MinIOTLS(t))
	storetest.Run(t, func(t *testing.T) upload.Store { return bucket(t, o) }, storetest.Options{})
}

func TestVersity(t *testing.T) {
	o := serverOptions(servers.Versity(t))
	storetest.Run(t, func(t *testing.T) upload.Store { return bucket(t, o) }, storetest.Options{})
}

func md5hex(b []byte) string {
	sum := md5.Sum(b)
	return hex.EncodeToString(sum[:])
}

// rerun runs one test of this binary in another process.
func rerun(t *testing.T, test string, env ...string) ([]byte, error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^"+test+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), env...)
	return cmd.CombinedOutput()
}
