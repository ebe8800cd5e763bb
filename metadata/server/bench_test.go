package server

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/instar-image/instar/metadata"
)

// BenchmarkGet is a request with a token, log, metrics and rate limit on.
func BenchmarkGet(b *testing.B) {
	s := start(b, Options{Metadata: metadata.Options{Source: source(b, record("i-0abc1234def567890", "127.0.0.1")), Rate: 1e9}})
	_, token := s.get(b, "PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 21600")
	benchGet(b, s.addr, token)
}

// BenchmarkConstant is what net/http needs for as short an answer.
func BenchmarkConstant(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = []string{"text/plain"}
		io.WriteString(w, "i-0abc1234def567890")
	})}
	go srv.Serve(ln)
	defer srv.Close()
	benchGet(b, ln.Addr().String(), "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
}

func benchGet(b *testing.B, addr, token string) {
	request := "GET " + instanceID + " HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: " + token + "\r\n\r\n"
	b.ReportAllocs()
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		r := bufio.NewReader(c)
		for pb.Next() {
			if _, err := io.WriteString(c, request); err != nil {
				b.Error(err)
				return
			}
			res, err := http.ReadResponse(r, nil)
			if err != nil {
				b.Error(err)
				return
			}
			if n, err := io.Copy(io.Discard, res.Body); err != nil || n != 19 {
				b.Error(n, err)
				return
			}
		}
	})
}
