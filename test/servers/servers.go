// Package servers starts real S3 servers for tests: MinIO and versitygw, on
// loopback, each with its own directory, stopped when the test ends.
//
// The programs are those test/tools installs; a program that is missing or
// still being built is built, or waited for, by the first test that needs it.
package servers

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/test/freeport"
)

// Server is a running S3 server and how to reach it.
type Server struct {
	Name      string // "minio", "versitygw"
	Endpoint  string // http://127.0.0.1:PORT, or https
	AccessKey string
	SecretKey string
	Region    string
	CACert    string // file with the certificate of its authority; empty for http
	Dir       string // where it keeps its objects
}

// MinIO starts MinIO over http.
func MinIO(t testing.TB) *Server { return minio(t, "") }

// MinIOTLS starts MinIO over https with a certificate from an authority of its
// own, which only [Server.CACert] makes trusted.
func MinIOTLS(t testing.TB) *Server {
	certs := t.TempDir()
	makeCerts(t, certs, "public.crt", "private.key")
	return minio(t, certs)
}

func minio(t testing.TB, certs string) *Server {
	t.Helper()
	s := newServer(t, "minio", certs != "")
	addr := strings.TrimPrefix(strings.TrimPrefix(s.Endpoint, "https://"), "http://")
	args := []string{"server", "--address", addr, "--console-address", freeport.Address(freeport.Port(t)), "--quiet"}
	if certs != "" {
		s.CACert = filepath.Join(certs, "ca.pem")
		args = append(args, "--certs-dir", certs)
	}
	s.start(t, append(args, s.Dir), "MINIO_ROOT_USER="+s.AccessKey, "MINIO_ROOT_PASSWORD="+s.SecretKey,
		"MINIO_CI_CD=1", "MINIO_UPDATE=off", "MINIO_BROWSER=off")
	return s
}

// Versity starts versitygw over http.
func Versity(t testing.TB) *Server {
	t.Helper()
	s := newServer(t, "versitygw", false)
	s.start(t, []string{
		"--port", strings.TrimPrefix(s.Endpoint, "http://"), "--region", s.Region,
		"posix", s.Dir,
	}, "ROOT_ACCESS_KEY="+s.AccessKey, "ROOT_SECRET_KEY="+s.SecretKey)
	return s
}

func newServer(t testing.TB, name string, tls bool) *Server {
	t.Helper()
	scheme := "http://"
	if tls {
		scheme = "https://"
	}
	return &Server{
		Name: name, Endpoint: scheme + freeport.Address(freeport.Port(t)), Region: "us-east-1",
		AccessKey: "AK" + strings.ToUpper(random(t)), SecretKey: random(t) + random(t), Dir: t.TempDir(),
	}
}

// start runs the program and waits until it answers.
func (s *Server) start(t testing.TB, args []string, env ...string) {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.Command(Program(t, s.Name), args...)
	cmd.Dir = s.Dir
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting %s: %v", s.Name, err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	client := s.Client(t)
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("%s ended at once: %v\n%s", s.Name, err, log.String())
		default:
		}
		if res, err := client.Get(s.Endpoint); err == nil {
			res.Body.Close()
			if res.StatusCode < 500 {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not answer at %s", s.Name, s.Endpoint)
		}
	}
}

// Env is what a client needs in its environment to reach the server.
func (s *Server) Env() []string {
	env := []string{
		"AWS_ACCESS_KEY_ID=" + s.AccessKey, "AWS_SECRET_ACCESS_KEY=" + s.SecretKey,
		"AWS_REGION=" + s.Region, "AWS_ENDPOINT_URL=" + s.Endpoint, "AWS_EC2_METADATA_DISABLED=true",
	}
	if s.CACert != "" {
		env = append(env, "AWS_CA_BUNDLE="+s.CACert)
	}
	return env
}

// Bucket makes a bucket with a new name.
func (s *Server) Bucket(t testing.TB) string {
	t.Helper()
	name := "instar-" + random(t)
	s.curl(t, nil, "-X", "PUT", s.Endpoint+"/"+name)
	return name
}

// Put stores an object.
func (s *Server) Put(t testing.TB, bucket, key string, data []byte) {
	t.Helper()
	s.curl(t, data, "-X", "PUT", "--header", "Content-Type: application/octet-stream", "--data-binary", "@-", s.Endpoint+"/"+bucket+"/"+key)
}

// Get returns an object's content.
func (s *Server) Get(t testing.TB, bucket, key string) []byte {
	t.Helper()
	return s.curl(t, nil, s.Endpoint+"/"+bucket+"/"+key)
}

// Delete removes an object.
func (s *Server) Delete(t testing.TB, bucket, key string) {
	t.Helper()
	s.curl(t, nil, "-X", "DELETE", s.Endpoint+"/"+bucket+"/"+key)
}

// Keys lists the keys of a bucket (at most 1000).
func (s *Server) Keys(t testing.TB, bucket string) []string {
	t.Helper()
	var list struct {
		IsTruncated bool
		Contents    []struct{ Key string }
	}
	out := s.curl(t, nil, s.Endpoint+"/"+bucket+"?list-type=2")
	if err := xml.Unmarshal(out, &list); err != nil {
		t.Fatalf("listing %s: %v\n%s", bucket, err, out)
	}
	if list.IsTruncated {
		t.Fatalf("listing %s: more than 1000 keys", bucket)
	}
	keys := make([]string, len(list.Contents))
	for i, c := range list.Contents {
		keys[i] = c.Key
	}
	return keys
}

// curl makes one signed request: a client that shares nothing with the product.
func (s *Server) curl(t testing.TB, body []byte, args ...string) []byte {
	t.Helper()
	sum := sha256.Sum256(body)
	all := []string{
		"--header", "x-amz-content-sha256: " + hex.EncodeToString(sum[:]),
		"--silent", "--show-error", "--fail-with-body", "--noproxy", "*", "--user", s.AccessKey + ":" + s.SecretKey,
		"--aws-sigv4", "aws:amz:" + s.Region + ":s3",
	}
	if s.CACert != "" {
		all = append(all, "--cacert", s.CACert)
	}
	cmd := exec.Command("curl", append(all, args...)...)
	cmd.Stdin = bytes.NewReader(body)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("curl %s: %v %s\n%s", strings.Join(args, " "), err, errs.String(), out)
	}
	return out
}

// Client is an HTTP client that trusts the server's authority.
func (s *Server) Client(t testing.TB) *http.Client {
	t.Helper()
	transport := &http.Transport{Proxy: nil}
	if s.CACert != "" {
		transport.TLSClientConfig = trust(t, s.CACert)
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// Program is the path of an installed program, which is built if it must be.
func Program(t testing.TB, name string) string {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("cannot tell where test/tools is")
	}
	tools := filepath.Join(filepath.Dir(file), "..", "tools")
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, tools, "go", name).CombinedOutput(); err != nil {
		t.Fatalf("installing %s: %v\n%s", name, err, out)
	}
	out, err := exec.CommandContext(ctx, tools, "path").Output()
	if err != nil {
		t.Fatalf("%s path: %v", tools, err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), name)
}

func random(t testing.TB) string {
	t.Helper()
	b := make([]byte, 8)
	if _, err := io.ReadFull(rand.Reader, b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}
