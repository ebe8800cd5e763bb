package ext4

import (
	"encoding/binary"
	"errors"
)

// ErrACL is the error of a [Warning] about an access control list that is left out.
var ErrACL = errors.New("not a POSIX ACL as the kernel gives it")

// storedACL turns an access control list from the form of the xattr
// system.posix_acl_* (include/uapi/linux/posix_acl_xattr.h, version 2) into
// the one ext4 stores (fs/ext4/acl.h, version 1), where only entries that
// name a user or group carry an id.
func storedACL(v []byte) ([]byte, error) {
	le := binary.LittleEndian
	if len(v) < 4 || le.Uint32(v) != 2 || (len(v)-4)%8 != 0 {
		return nil, ErrACL
	}
	const userObj, user, groupObj, group, mask, other = 1, 2, 4, 8, 16, 32
	out := le.AppendUint32(nil, 1)
	for v = v[4:]; len(v) > 0; v = v[8:] {
		switch le.Uint16(v) {
		case user, group:
			out = append(out, v[:8]...)
		case userObj, groupObj, mask, other:
			out = append(out, v[:4]...)
		default:
			return nil, ErrACL
		}
	}
	return out, nil
}
