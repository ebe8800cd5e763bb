package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/instar-image/instar/test/bench/internal/shell"
	"github.com/instar-image/instar/upload"
)

// bucket is where the image's store is in MinIO.
const bucket = "bench"

// minio is a MinIO that runs.
type minio struct {
	url            string
	access, secret string
	cmd            *exec.Cmd
	said           bytes.Buffer
	ended          chan error
}

// startMinIO starts the MinIO that test/tools installs, on a directory, and waits
// until it answers.
func startMinIO(ctx context.Context, dir string) (*minio, error) {
	program, err := shell.Run(ctx, `test/tools go minio >&2; echo "$(test/tools path)/minio"`)
	if err != nil {
		return nil, err
	}
	var free [2]string // of the store, and of a console that nobody uses
	for n := range free {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // not before there are two
		free[n] = l.Addr().String()
		if err := l.Close(); err != nil {
			return nil, err
		}
	}
	m := &minio{url: "http://" + free[0], access: rand.Text(), secret: rand.Text(), ended: make(chan error, 1)}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	m.cmd = exec.Command(program, "server", "--address", free[0], "--console-address", free[1], "--quiet", dir)
	m.cmd.Dir = dir
	m.cmd.Env = append(os.Environ(), "MINIO_ROOT_USER="+m.access, "MINIO_ROOT_PASSWORD="+m.secret, "MINIO_CI_CD=1", "MINIO_UPDATE=off", "MINIO_BROWSER=off")
	m.cmd.Stdout, m.cmd.Stderr = &m.said, &m.said
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting MinIO: %w", err)
	}
	go func() { m.ended <- m.cmd.Wait() }()
	for {
		res, err := http.Get(m.url + "/minio/health/ready")
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				break
			}
		}
		select {
		case err := <-m.ended:
			return nil, fmt.Errorf("MinIO ended at once: %w\n%s", err, m.said.String())
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), m.stop())
		case <-time.After(100 * time.Millisecond):
		}
	}
	if _, err := shell.Run(ctx, `curl -sS --fail-with-body --noproxy '*' --user "$1" --aws-sigv4 aws:amz:us-east-1:s3 -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' -X PUT "$2"`,
		m.access+":"+m.secret, m.url+"/"+bucket); err != nil {
		return nil, errors.Join(err, m.stop())
	}
	return m, nil
}

func (m *minio) stop() error {
	err := m.cmd.Process.Kill()
	<-m.ended
	return err
}

// env is a client's environment.
func (m *minio) env(endpoint string) []string {
	return []string{
		"AWS_ACCESS_KEY_ID=" + m.access, "AWS_SECRET_ACCESS_KEY=" + m.secret, "AWS_REGION=us-east-1", "AWS_ENDPOINT_URL=" + endpoint,
		"AWS_EC2_METADATA_DISABLED=true", "NO_PROXY=*",
	}
}

// fill copies a store's objects to the bucket.
func (m *minio) fill(ctx context.Context, from upload.Store) error {
	to, err := upload.Open(ctx, "s3://"+bucket, upload.Options{Endpoint: m.url, Region: "us-east-1", Credentials: &upload.Credentials{AccessKeyID: m.access, SecretAccessKey: m.secret}})
	if err != nil {
		return err
	}
	defer to.Close()
	for o, err := range from.List(ctx, "") {
		if err != nil {
			return err
		}
		body, _, err := from.Get(ctx, o.Key, upload.GetOptions{})
		if err == nil {
			_, err = to.PutStream(ctx, o.Key, body, upload.PutOptions{})
			err = errors.Join(err, body.Close())
		}
		if err != nil {
			return fmt.Errorf("copying %s to MinIO: %w", o.Key, err)
		}
	}
	return nil
}

// fetched is a request that was answered.
type fetched struct{ path, span string }

// way is a line to MinIO, on which all that is asked for is noted.
type way struct {
	*httptest.Server
	url  string
	line *pacing

	mu   sync.Mutex
	list []fetched
}

// behind listens for clients whose requests go to MinIO by a line.
func (m *minio) behind(l line) (*way, error) {
	there, err := url.Parse(m.url)
	if err != nil {
		return nil, err
	}
	w := &way{line: &pacing{line: l}}
	forward := &httputil.ReverseProxy{
		// The signature is over the name that the client knows.
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(there)
			r.Out.Host = r.In.Host
		},
		Transport: &http.Transport{Proxy: nil, DisableCompression: true},
		ModifyResponse: func(r *http.Response) error {
			r.Body = &paced{ReadCloser: r.Body, ctx: r.Request.Context(), line: w.line}
			return nil
		},
		FlushInterval: -1,
	}
	w.Server = httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.list = append(w.list, fetched{r.URL.EscapedPath(), r.Header.Get("Range")})
		w.mu.Unlock()
		if pause(r.Context(), l.delay) == nil {
			forward.ServeHTTP(out, r)
		}
	}))
	w.url = w.Server.URL
	return w, nil
}

func (w *way) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = nil
}

func (w *way) asked() []fetched {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]fetched(nil), w.list...)
}
