package rpcjson

import "syscall"

// ownerOnly sets the mode that the file of a socket gets when it is bound
// (unix(7)), so that nobody else can connect at any moment.
func ownerOnly(c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }); e != nil {
		return e
	}
	return err
}
