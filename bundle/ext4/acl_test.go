package ext4

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// FuzzStoredACL: what is accepted can be turned back, so nothing was lost.
func FuzzStoredACL(f *testing.F) {
	f.Add([]byte("\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x20\x00\x05\x00\xff\xff\xff\xff"))
	f.Add([]byte("\x02\x00\x00\x00\x02\x00\x07\x00\xe8\x03\x00\x00"))
	f.Add([]byte("\x02\x00\x00\x00\x03\x00\x07\x00\xe8\x03\x00\x00"))
	f.Add([]byte("\x01\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, v []byte) {
		s, err := storedACL(v)
		if err != nil {
			return
		}
		le := binary.LittleEndian
		back := le.AppendUint32(nil, 2)
		for s = s[4:]; len(s) > 0; {
			tag := le.Uint16(s)
			back = append(back, s[:4]...)
			s = s[4:]
			if tag == 2 || tag == 8 {
				back = append(back, s[:4]...)
				s = s[4:]
			} else {
				back = le.AppendUint32(back, 0xffffffff)
			}
		}
		if len(back) != len(v) || !bytes.Equal(back[:4], v[:4]) {
			t.Fatalf("%x became %x", v, back)
		}
		for i := 4; i < len(v); i += 8 {
			n := 4
			if tag := le.Uint16(v[i:]); tag == 2 || tag == 8 {
				n = 8
			}
			if !bytes.Equal(back[i:i+n], v[i:i+n]) {
				t.Fatalf("%x became %x", v, back)
			}
		}
	})
}
