package ext4

import "math/bits"

// dirHash is the htree hash of a name: half MD4 over unsigned characters, as
// fs/ext4/hash.c has it. The low bit of the hash is the htree's own.
func dirHash(name []byte, seed *[4]uint32) (hash, minor uint32) {
	buf := *seed
	var in [8]uint32
	for len(name) > 0 {
		hashWords(name, &in)
		halfMD4(&buf, &in)
		name = name[min(32, len(name)):]
	}
	const eof = 0x7fffffff << 1 // marks the end of a directory to readdir
	hash = buf[1] &^ 1
	if hash == eof {
		hash = eof - 2
	}
	return hash, buf[2]
}

// hashWords packs up to 32 bytes of name, filled up with its length.
func hashWords(name []byte, out *[8]uint32) {
	n := uint32(len(name))
	pad := n | n<<8
	pad |= pad << 16
	for i := range out {
		v := pad
		for j := i * 4; j < min(i*4+4, len(name)); j++ {
			v = v<<8 + uint32(name[j])
		}
		out[i] = v
	}
}

func halfMD4(buf *[4]uint32, in *[8]uint32) {
	const k2, k3 = 0x5a827999, 0x6ed9eba1
	a, b, c, d := buf[0], buf[1], buf[2], buf[3]
	f := func(x, y, z uint32) uint32 { return z ^ x&(y^z) }
	g := func(x, y, z uint32) uint32 { return x&y + (x^y)&z }
	h := func(x, y, z uint32) uint32 { return x ^ y ^ z }
	for i := 0; i < 8; i += 4 {
		a = bits.RotateLeft32(a+f(b, c, d)+in[i], 3)
		d = bits.RotateLeft32(d+f(a, b, c)+in[i+1], 7)
		c = bits.RotateLeft32(c+f(d, a, b)+in[i+2], 11)
		b = bits.RotateLeft32(b+f(c, d, a)+in[i+3], 19)
	}
	for i := 1; i >= 0; i-- {
		a = bits.RotateLeft32(a+g(b, c, d)+in[i]+k2, 3)
		d = bits.RotateLeft32(d+g(a, b, c)+in[i+2]+k2, 5)
		c = bits.RotateLeft32(c+g(d, a, b)+in[i+4]+k2, 9)
		b = bits.RotateLeft32(b+g(c, d, a)+in[i+6]+k2, 13)
	}
	a = bits.RotateLeft32(a+h(b, c, d)+in[3]+k3, 3)
	d = bits.RotateLeft32(d+h(a, b, c)+in[7]+k3, 9)
	c = bits.RotateLeft32(c+h(d, a, b)+in[2]+k3, 11)
	b = bits.RotateLeft32(b+h(c, d, a)+in[6]+k3, 15)
	a = bits.RotateLeft32(a+h(b, c, d)+in[1]+k3, 3)
	d = bits.RotateLeft32(d+h(a, b, c)+in[5]+k3, 9)
	c = bits.RotateLeft32(c+h(d, a, b)+in[0]+k3, 11)
	b = bits.RotateLeft32(b+h(c, d, a)+in[4]+k3, 15)
	buf[0] += a
	buf[1] += b
	buf[2] += c
	buf[3] += d
}
