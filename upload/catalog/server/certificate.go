package server

import (
	"crypto/tls"
	"fmt"
	"os"
	"sync"
	"time"
)

// certificate is read anew when its files change.
type certificate struct {
	cert, key string

	mu      sync.Mutex
	looked  time.Time
	changed [2]time.Time
	pair    *tls.Certificate
}

// lookEvery is how often files are looked at, at most.
const lookEvery = time.Second

func newCertificate(cert, key string) (*certificate, error) {
	c := &certificate{cert: cert, key: key}
	_, err := c.get(nil)
	return c, err
}

// get gives the certificate. One that cannot be read leaves the one of before.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pair != nil && time.Since(c.looked) < lookEvery {
		return c.pair, nil
	}
	c.looked = time.Now()
	var now [2]time.Time
	for i, f := range []string{c.cert, c.key} {
		st, err := os.Stat(f)
		if err != nil {
			return c.before(err)
		}
		now[i] = st.ModTime()
	}
	if c.pair != nil && now == c.changed {
		return c.pair, nil
	}
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return c.before(err)
	}
	c.pair, c.changed = &pair, now
	return c.pair, nil
}

func (c *certificate) before(err error) (*tls.Certificate, error) {
	if c.pair != nil {
		return c.pair, nil
	}
	return nil, fmt.Errorf("certificate %s: %w", c.cert, err)
}
