package rpcjson

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/slotota/ota"
)

// Limits of a file of passwords.
const (
	maxPasswordFile = 1 << 20
	maxPasswordLine = 1 << 10
	maxUsers        = 1000
)

// Passwords are the users of one realm with the hashes of their passwords. They
// are not changed after they were read, and may be used concurrently.
type Passwords struct {
	realm string
	users map[string]map[Algorithm]string // hash in lower case hexadecimal
}

// HashPassword returns the line of a password file for user (see
// [ParsePasswords]). Its hash is as good as the password itself for whoever gets
// hold of it, and short passwords can be guessed from it. The error wraps
// [ota.ErrInvalid].
func HashPassword(a Algorithm, user, realm, password string) (string, error) {
	if a != MD5 && a != SHA256 {
		return "", fmt.Errorf("rpcjson: password: algorithm %s: need MD5 or SHA-256: %w", ota.Quote(string(a)), ota.ErrInvalid)
	}
	line := user + ":" + realm + ":" + a.hash(user, realm, password)
	if _, _, err := parsePassword(line); err != nil {
		return "", fmt.Errorf("rpcjson: password: %w: %w", err, ota.ErrInvalid)
	}
	return line, nil
}

// ParsePasswords reads the file of passwords that Mongoose OS (rpc.auth_file) and
// Apache's htdigest have: a line user:realm:hash for each user and algorithm, the
// hash of user:realm:password being 32 hexadecimal digits for MD5 and 64 for
// SHA-256. Lines of other realms, empty ones and those that begin with # are left
// out. At most 1000 users and 1 MiB.
//
// The error wraps [ota.ErrInvalid] and names the line, or is that of r.
func ParsePasswords(r io.Reader, realm string) (*Passwords, error) {
	p := &Passwords{realm: realm, users: map[string]map[Algorithm]string{}}
	lr := &io.LimitedReader{R: r, N: maxPasswordFile + 1}
	sc := bufio.NewScanner(lr)
	sc.Buffer(make([]byte, 0, maxPasswordLine), maxPasswordLine)
	n := 0
	bad := func(err error) (*Passwords, error) {
		return nil, fmt.Errorf("rpcjson: password file: line %d: %w: %w", n, err, ota.ErrInvalid)
	}
	for sc.Scan() {
		n++
		line := strings.TrimSuffix(sc.Text(), "\r")
		if line == "" || line[0] == '#' {
			continue
		}
		e, a, err := parsePassword(line)
		if err != nil {
			return bad(err)
		}
		if e[1] != realm {
			continue
		}
		u := p.users[e[0]]
		if u == nil {
			u = map[Algorithm]string{}
			p.users[e[0]] = u
		}
		if u[a] != "" {
			return bad(errors.New("a second one for the same user and algorithm"))
		}
		if len(p.users) > maxUsers {
			return bad(fmt.Errorf("more than %d users", maxUsers))
		}
		u[a] = strings.ToLower(e[2])
	}
	switch err := sc.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		n++
		return bad(fmt.Errorf("longer than %d bytes", maxPasswordLine))
	case err != nil:
		return nil, fmt.Errorf("rpcjson: password file: %w", err)
	case lr.N == 0:
		return bad(fmt.Errorf("the file is larger than %d bytes", maxPasswordFile))
	}
	return p, nil
}

// parsePassword splits a line into user, realm and hash. The error does not show
// what may be a hash or a password.
func parsePassword(line string) (e [3]string, a Algorithm, err error) {
	f := strings.Split(line, ":")
	if len(f) != 3 {
		return e, "", errors.New("need user:realm:hash")
	}
	for i, name := range [2]string{"user", "realm"} {
		if f[i] == "" || len(f[i]) > 128 || strings.ContainsFunc(f[i], func(r rune) bool { return r < ' ' || r == 0x7f || r == 0xfffd }) {
			return e, "", fmt.Errorf("%s: need 1 to 128 bytes of text without control characters", name)
		}
	}
	switch len(f[2]) {
	case 32:
		a = MD5
	case 64:
		a = SHA256
	default:
		return e, "", errors.New("hash: need 32 or 64 hexadecimal digits")
	}
	for i := range len(f[2]) {
		if !isHex(f[2][i]) {
			return e, "", errors.New("hash: need hexadecimal digits")
		}
	}
	return [3]string(f), a, nil
}

// offered returns the algorithms to be offered, best first: those that are known
// of every user, or else of any.
func (p *Passwords) offered() (all []Algorithm) {
	var some []Algorithm
	for _, a := range algorithms {
		n := 0
		for _, u := range p.users {
			if u[a] != "" {
				n++
			}
		}
		if n > 0 {
			some = append(some, a)
		}
		if n > 0 && n == len(p.users) {
			all = append(all, a)
		}
	}
	if all == nil {
		return some
	}
	return all
}
