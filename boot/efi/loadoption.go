package efi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/slotota/ota"
)

// ErrFormat says that bytes are not what they should be: a load option, a list of
// options, a partition table. It is wrapped with what and where.
var ErrFormat = errors.New("malformed")

// Active is the attribute of a load option that the firmware may start by itself.
const Active = 1

// LoadOption is an EFI_LOAD_OPTION (UEFI 2.10, section 3.1.3): the content of a
// variable Boot####.
type LoadOption struct {
	Attributes  uint32
	Description string
	// Path is the device path of the program, without the node that ends it.
	// If the option has several, which is rare, they are separated by such
	// nodes (Type 0x7f, SubType 0xff).
	Path []Node
	// Optional is passed to the program. For a Linux kernel that is its
	// command line, see [EncodeString].
	Optional []byte
}

// Node is a device path node (UEFI 2.10, section 10.2).
type Node struct {
	Type, SubType byte
	Data          []byte
}

// The device path nodes that this package makes.
const (
	typeMedia, subHardDrive, subFile = 4, 1, 4
	typeEnd, subEndEntire            = 0x7f, 0xff
)

var le = binary.LittleEndian

// ParseLoadOption decodes a load option. Errors wrap [ErrFormat].
func ParseLoadOption(b []byte) (*LoadOption, error) {
	if len(b) < 8 {
		return nil, fmt.Errorf("efi: load option of %d bytes: %w", len(b), ErrFormat)
	}
	o := &LoadOption{Attributes: le.Uint32(b)}
	n := int(le.Uint16(b[4:]))
	desc, rest, ok := cutString(b[6:])
	if !ok {
		return nil, fmt.Errorf("efi: load option: the description does not end: %w", ErrFormat)
	}
	o.Description = desc
	if len(rest) < n {
		return nil, fmt.Errorf("efi: load option %s: device path of %d bytes, %d are there: %w", ota.Quote(desc), n, len(rest), ErrFormat)
	}
	path := rest[:n]
	ended := false
	for len(path) > 0 {
		size := 0
		if len(path) >= 4 {
			size = int(le.Uint16(path[2:]))
		}
		if size < 4 || size > len(path) {
			return nil, fmt.Errorf("efi: load option %s: device path node at byte %d of %d: %w", ota.Quote(desc), n-len(path), n, ErrFormat)
		}
		node := Node{path[0], path[1], slices.Clone(path[4:size])}
		ended = node.Type == typeEnd && node.SubType == subEndEntire && size == 4
		o.Path = append(o.Path, node)
		path = path[size:]
	}
	if !ended {
		return nil, fmt.Errorf("efi: load option %s: the device path does not end: %w", ota.Quote(desc), ErrFormat)
	}
	o.Path = o.Path[:len(o.Path)-1]
	o.Optional = slices.Clone(rest[n:])
	return o, nil
}

// Bytes encodes o. Errors wrap [ota.ErrInvalid].
func (o *LoadOption) Bytes() ([]byte, error) {
	var path []byte
	for _, n := range append(slices.Clip(o.Path), Node{typeEnd, subEndEntire, nil}) {
		if len(n.Data) > 0xffff-4 {
			return nil, fmt.Errorf("efi: device path node of %d bytes: %w", len(n.Data), ota.ErrInvalid)
		}
		path = append(path, n.Type, n.SubType)
		path = le.AppendUint16(path, uint16(4+len(n.Data)))
		path = append(path, n.Data...)
	}
	if len(path) > 0xffff || strings.Contains(o.Description, "\x00") {
		return nil, fmt.Errorf("efi: load option %s: device path of %d bytes, or zero in description: %w", ota.Quote(o.Description), len(path), ota.ErrInvalid)
	}
	b := le.AppendUint32(nil, o.Attributes)
	b = le.AppendUint16(b, uint16(len(path)))
	b = append(b, EncodeString(o.Description)...)
	b = append(b, path...)
	return append(b, o.Optional...), nil
}

// EncodeString returns s in UTF-16, little-endian, ended by a zero: the form of
// strings in UEFI, and of the command line for a kernel.
func EncodeString(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = le.AppendUint16(b, u)
	}
	return append(b, 0, 0)
}

// DecodeString is the inverse of [EncodeString]. The zero may be missing; what
// follows it is ignored.
func DecodeString(b []byte) string {
	s, _, _ := cutString(b)
	return s
}

// cutString decodes the string at the start of b; ended says that there was a zero.
func cutString(b []byte) (s string, rest []byte, ended bool) {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		c := le.Uint16(b)
		if c == 0 {
			return string(utf16.Decode(u)), b[2:], true
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u)), nil, false
}

// HardDrive is a partition of a GPT disk, as a device path names it (UEFI 2.10,
// section 10.3.5.1). [Partition] reads it from the disk.
type HardDrive struct {
	Number      uint32 // of the partition, from 1
	Start, Size uint64 // in blocks of the disk
	GUID        GUID   // of the partition: Linux calls it PARTUUID
}

const (
	hardDriveSize        = 38
	formatGPT, signatGPT = 2, 2
)

// Node returns the device path node.
func (h HardDrive) Node() Node {
	b := le.AppendUint32(nil, h.Number)
	b = le.AppendUint64(b, h.Start)
	b = le.AppendUint64(b, h.Size)
	b = append(b, h.GUID[:]...)
	return Node{typeMedia, subHardDrive, append(b, formatGPT, signatGPT)}
}

// HardDrive returns the partition that n stands for; ok is false if it is none, or
// none of a GPT disk.
func (n Node) HardDrive() (h HardDrive, ok bool) {
	b := n.Data
	if n.Type != typeMedia || n.SubType != subHardDrive || len(b) != hardDriveSize || b[36] != formatGPT || b[37] != signatGPT {
		return h, false
	}
	return HardDrive{le.Uint32(b), le.Uint64(b[4:]), le.Uint64(b[12:]), GUID(b[20:36])}, true
}

// FileNode returns the device path node for a file (UEFI 2.10, section 10.3.5.4).
// Slashes become backslashes.
func FileNode(name string) Node {
	return Node{typeMedia, subFile, EncodeString(strings.ReplaceAll(name, "/", `\`))}
}

// File returns the name of the file that n stands for.
func (n Node) File() (name string, ok bool) {
	if n.Type != typeMedia || n.SubType != subFile {
		return "", false
	}
	return DecodeString(n.Data), true
}

// String returns the text form of a device path node (UEFI 2.10, section 10.6).
func (n Node) String() string {
	if h, ok := n.HardDrive(); ok {
		return fmt.Sprintf("HD(%d,GPT,%v,0x%x,0x%x)", h.Number, h.GUID, h.Start, h.Size)
	}
	if f, ok := n.File(); ok {
		return "File(" + f + ")"
	}
	return fmt.Sprintf("Path(%d,%d,%x)", n.Type, n.SubType, n.Data)
}
