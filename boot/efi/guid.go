package efi

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/slotota/ota"
)

// GUID is a GUID as UEFI and GPT store it: the first three groups of its text are
// little-endian.
type GUID [16]byte

// String returns the text form, in lower case, as in /dev/disk/by-partuuid.
func (g GUID) String() string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", le.Uint32(g[:]), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:])
}

// ParseGUID is the inverse of [GUID.String]; upper case is accepted, too.
func ParseGUID(s string) (g GUID, err error) {
	digits := strings.ReplaceAll(s, "-", "")
	b, err := hex.DecodeString(digits)
	if err != nil || copy(g[:], b) != len(g) || len(b) != len(g) {
		return GUID{}, fmt.Errorf("efi: %s is not a GUID: %w", ota.Quote(s), ota.ErrInvalid)
	}
	be, le := binary.BigEndian, binary.LittleEndian
	le.PutUint32(g[:], be.Uint32(b))
	le.PutUint16(g[4:], be.Uint16(b[4:]))
	le.PutUint16(g[6:], be.Uint16(b[6:]))
	if !strings.EqualFold(g.String(), s) {
		return GUID{}, fmt.Errorf("efi: %s is not a GUID: %w", ota.Quote(s), ota.ErrInvalid)
	}
	return g, nil
}
